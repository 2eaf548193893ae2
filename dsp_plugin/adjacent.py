"""Tensors that lie next to each other in memory, and are one tensor therefore."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor


def in_order(x: Tensor, dim: int) -> bool:
    """Whether the dims from ``dim`` on are one stretch of memory."""
    expected = 1
    for size, stride in zip(reversed(x.shape[dim:]), reversed(x.stride()[dim:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def adjacent(tensors: Sequence[Tensor], dim: int) -> Tensor | None:
    """The one contiguous tensor that the tensors are next to each other, the dims from ``dim`` on as one; or None.

    So no two of them share an element.
    """
    first, storage = tensors[0], tensors[0].untyped_storage()._cdata
    widths = [prod(x.shape[dim:]) for x in tensors]
    offset, shape = first.storage_offset(), (*first.shape[:dim], sum(widths))
    # Of a dim of one entry the stride says nothing.
    wanted = [prod(shape[place + 1 :]) for place in range(dim) if shape[place] != 1]
    for x, width in zip(tensors, widths, strict=True):
        steps = [step for step, size in zip(x.stride(), shape[:dim], strict=False) if size != 1]
        if x.storage_offset() != offset or steps != wanted or x.untyped_storage()._cdata != storage:
            return None
        if not in_order(x, dim):
            return None
        offset += width
    return first.as_strided(shape, [prod(shape[place + 1 :]) for place in range(dim + 1)])
