"""Keys and values of some tokens in one flat buffer, as they travel round a ring; their gradients alike."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """Keys and values, or their gradients.

    Attributes:
        k: ``[B, tokens, K, D]``.
        v: ``[B, tokens, K, Dv]``.
        flat: the 1-D buffer that both are views of, k first; None where they do not share one.
    """

    k: Tensor
    v: Tensor
    flat: Tensor | None = None


def numel(like: Tokens, slices: Sequence[slice]) -> int:
    """Elements of the keys and values of the tokens in the slices, shaped like those of ``like``."""
    return sum(map(prod, _shapes(like, count(slices))))


def count(slices: Sequence[slice]) -> int:
    """Tokens in the slices."""
    return sum(run.stop - run.start for run in slices)


def views(flat: Tensor, like: Tokens, tokens: int) -> Tokens:
    """A flat buffer as the keys and values of that many tokens, shaped like ``like``."""
    shapes = _shapes(like, tokens)
    k, v = (part.view(shape) for part, shape in zip(flat.split([prod(s) for s in shapes]), shapes, strict=True))
    return Tokens(k, v, flat)


def zeros(like: Tokens, tokens: int) -> Tokens:
    """Zeros for that many tokens, shaped like ``like`` and of its dtype."""
    return views(like.k.new_zeros(sum(map(prod, _shapes(like, tokens)))), like, tokens)


def packed(tokens: Tokens, slices: Sequence[slice], dtype: torch.dtype) -> Tensor:
    """The tokens in the slices as a flat buffer of ``dtype``; the one they lie in, if that is it."""
    everything = slices == (slice(0, tokens.k.shape[1]),)
    if everything and tokens.flat is not None and tokens.flat.dtype == dtype:
        return tokens.flat
    out = views(tokens.k.new_empty(numel(tokens, slices), dtype=dtype), tokens, count(slices))
    assert out.flat is not None
    for x, into in ((tokens.k, out.k), (tokens.v, out.v)):
        torch.cat([x[:, run] for run in slices], 1, out=into)
    return out.flat


def joined(like: Tokens, tokens: int, parts: Sequence[tuple[Tensor, Sequence[slice]]]) -> Tokens:
    """Flat buffers put together: of each its slices among ``tokens`` tokens, which they cover. One part stays as it is.

    Args:
        like: in whose shapes.
    """
    if len(parts) == 1:
        return views(parts[0][0], like, tokens)
    whole = zeros(like, tokens)
    for flat, slices in parts:
        add_(whole, slices, flat)
    return whole


def add_(total: Tokens, slices: Sequence[slice], flat: Tensor) -> None:
    """Add the tokens of a flat buffer to those of ``total`` in the slices."""
    part = views(flat, total, count(slices))
    for x, of_x in ((part.k, total.k), (part.v, total.v)):
        for run, piece in zip(slices, x.split([run.stop - run.start for run in slices], 1), strict=True):
            of_x[:, run].add_(piece)


def _shapes(like: Tokens, tokens: int) -> list[torch.Size]:
    return [torch.Size((x.shape[0], tokens, *x.shape[2:])) for x in (like.k, like.v)]
