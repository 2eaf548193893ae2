"""Keys and values of some tokens in one flat buffer, as they travel round a ring; their gradients alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsp_plugin.methods.places import Places


class Tokens(NamedTuple):
    """Keys and values, or their gradients.

    Attributes:
        k: ``[B, tokens, K, D]``.
        v: ``[B, tokens, K, Dv]``.
        flat: the 1-D buffer that both are views of, row by row of the batch the keys, then the values; None where they
            do not share one.
    """

    k: Tensor
    v: Tensor
    flat: Tensor | None = None

    @property
    def number(self) -> int:
        """How many tokens there are."""
        return self.k.shape[1]


def numel(like: Tokens, places: Places) -> int:
    """Elements of the keys and values of some tokens, shaped like those of ``like``."""
    return like.k.shape[0] * sum(_widths(like, places.count))


def views(flat: Tensor, like: Tokens, tokens: int) -> Tokens:
    """A flat buffer as the keys and values of that many tokens, shaped like ``like``."""
    batch, widths = like.k.shape[0], _widths(like, tokens)
    k, v = flat.view(batch, sum(widths)).split(widths, 1)
    return Tokens(k.view(batch, tokens, *like.k.shape[2:]), v.view(batch, tokens, *like.v.shape[2:]), flat)


def empty(like: Tokens, tokens: int, dtype: torch.dtype) -> Tokens:
    """Room for that many tokens, shaped like ``like``."""
    return views(like.k.new_empty(like.k.shape[0] * sum(_widths(like, tokens)), dtype=dtype), like, tokens)


def packed(tokens: Tokens, places: Places, dtype: torch.dtype) -> Tensor:
    """Some of the tokens as a flat buffer of ``dtype``; the one they lie in, if that is it."""
    if places.covers(tokens.number) and tokens.flat is not None:
        return tokens.flat.to(dtype)
    out = empty(tokens, places.count, dtype)
    assert out.flat is not None
    k, v = places.views(tokens.k), places.views(tokens.v)
    if not k or not v:
        for x, into in ((tokens.k, out.k), (tokens.v, out.v)):
            into.copy_(places.pick(x))
    elif dtype == tokens.k.dtype:
        _in_one(k, v, out.flat)
    else:
        for parts, into in ((k, out.k), (v, out.v)):
            for part, room in zip(parts, into.split([part.shape[1] for part in parts], 1), strict=True):
                room.copy_(part)
    return out.flat


def joined(like: Tokens, tokens: int, parts: Sequence[tuple[Tensor, Places]]) -> Tokens:
    """Flat buffers put together: of each its places among ``tokens`` tokens, which they cover. One part stays as it is.

    Args:
        like: in whose shapes.
    """
    if len(parts) == 1:
        return views(parts[0][0], like, tokens)
    whole = empty(like, tokens, like.k.dtype)
    for flat, places in parts:
        part = views(flat, like, places.count)
        places.put_(whole.k, part.k)
        places.put_(whole.v, part.v)
    return whole


def add_(total: Tokens, places: Places, part: Tokens) -> None:
    """Add the tokens of ``part`` to those of ``total`` at their places."""
    if total.flat is not None and part.flat is not None and places.covers(total.number):
        total.flat.add_(part.flat)
        return
    places.add_(total.k, part.k)
    places.add_(total.v, part.v)


def _in_one(k: Sequence[Tensor], v: Sequence[Tensor], flat: Tensor) -> None:
    """Keys and values, given in stretches, one behind the other in each row of the batch."""
    batch, _, heads, dim = k[0].shape
    if dim == v[0].shape[3]:
        torch.cat([*k, *v], 1, out=flat.view(batch, sum(part.shape[1] for part in (*k, *v)), heads, dim))
    else:
        parts = [part.flatten(1) for part in (*k, *v)]
        torch.cat(parts, 1, out=flat.view(batch, sum(part.shape[1] for part in parts)))


def _widths(like: Tokens, tokens: int) -> list[int]:
    """Elements of the keys and of the values in a row of the batch."""
    return [tokens * x.shape[2] * x.shape[3] for x in (like.k, like.v)]
