"""Copies and sums that take one launch for all ranks, where Python would otherwise loop over them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsp_plugin.adjacent import adjacent, in_order


def side_by_side(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors next to each other, the dims from ``dim`` on as one, contiguous; as they lie, if they lie like that.

    In one launch where those dims lie in order, in one for each tensor otherwise.
    """
    if len(tensors) == 1:
        return tensors[0].contiguous()
    lying = adjacent(tensors, dim)
    if lying is not None:
        return lying
    widths = [prod(x.shape[dim:]) for x in tensors]
    if all(in_order(x, dim) for x in tensors):
        return torch.cat([x.view(*x.shape[:dim], width) for x, width in zip(tensors, widths, strict=True)], -1)
    joined = tensors[0].new_empty(*tensors[0].shape[:dim], sum(widths))
    for x, part in zip(tensors, joined.split(widths, -1), strict=True):
        part.unflatten(-1, x.shape[dim:]).copy_(x)
    return joined


def added_up(layered: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of the layers, taken in fp32 or wider: bfloat16 would lose what each of them kept.

    Args:
        layered: [layers, ...].
        dtype: of the sum.
    """
    if len(layered) == 1:
        return layered[0]
    return layered.sum(0, dtype=torch.promote_types(layered.dtype, torch.float32)).to(dtype)


def layers(
    places: Sequence[NDArray[np.int64]], sources: Sequence[NDArray[np.int64]], length: int, nothing: int
) -> NDArray[np.int64]:
    """For each place its sources, in the order given: ``[layers, length]``, as many as the place with most has.

    Args:
        places: in groups, in which there may be one more than once.
        sources: of each.
        nothing: the source of what has fewer.
    """
    where, what = np.concatenate(places), np.concatenate(sources)
    by_place = np.argsort(where, kind="stable")
    where, what = where[by_place], what[by_place]
    counts = np.bincount(where, minlength=length)
    layer = np.arange(len(where)) - np.repeat(np.cumsum(counts) - counts, counts)
    found = np.full((max(int(counts.max(initial=1)), 1), length), nothing, dtype=np.int64)
    found[layer, where] = what
    return found
