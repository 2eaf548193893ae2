"""What it costs to split tokens, to switch their sharded dim, and to gather them, tokens of another kind included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from dsp_plugin.layout import shard_sizes
from dsp_plugin.methods.dsp import switch_bytes
from dsp_plugin.methods.method import WireBytes
from dsp_plugin.plans.pattern import Extra


@dataclass(frozen=True)
class Activation:
    """The activation that stages hand on.

    Attributes:
        sizes: length of every token dim by name, in memory order. All but the batch may be sharded.
        features: elements per token.
        element_size: bytes per element.
        batch_dim: the dim that data parallelism shards; None where the batch may be sharded as well.
    """

    sizes: Mapping[str, int]
    features: int
    element_size: int
    batch_dim: str | None = "b"

    @property
    def shardable(self) -> tuple[str, ...]:
        """The dims that sequence parallelism may shard."""
        return tuple(dim for dim in self.sizes if dim != self.batch_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole activation."""
        return prod(self.sizes.values()) * self.features * self.element_size


@dataclass(frozen=True)
class Shard:
    """A tensor to move: its token dims, and the bytes of everything else for one token.

    ``backward`` is whether a gradient comes back.
    """

    sizes: Mapping[str, int]
    token_bytes: int
    backward: bool = True


@dataclass(frozen=True)
class Border:
    """What is split or gathered at the border of the sharded stretch.

    Attributes:
        token_bytes: bytes for one token.
        extras: tokens of another kind.
        backward: whether a gradient passes.
        dims: the token dims that it still has; all if None.
    """

    token_bytes: int
    extras: tuple[Extra, ...] = ()
    backward: bool = True
    dims: tuple[str, ...] | None = None

    def has(self, dim: str) -> bool:
        """Whether it can be sharded along ``dim``."""
        return self.dims is None or dim in self.dims

    def of(self, activation: Activation) -> Shard:
        """The tensor, with the token dims of the activation."""
        sizes = {name: length for name, length in activation.sizes.items() if self.has(name)}
        return Shard(sizes, self.token_bytes, self.backward)


class _Piece(NamedTuple):
    """Tokens of one kind: their dims, and bytes for one index of all of them."""

    sizes: Mapping[str, int]
    nbytes: int


def none_sent(size: int) -> list[WireBytes]:
    """No bytes, by rank."""
    return [WireBytes(0, 0)] * size


def added(*parts: Sequence[WireBytes]) -> list[WireBytes]:
    """The sums by rank."""
    return [
        WireBytes(sum(part.forward for part in rank), sum(part.backward for part in rank))
        for rank in zip(*parts, strict=True)
    ]


def move(
    tensor: Shard, extras: Sequence[Extra], source: str | None, target: str | None, size: int
) -> Sequence[WireBytes]:
    """Bytes leaving each rank when a tensor goes from one sharded dim to another; None is whole on every rank.

    A dim that tokens of another kind do not run along leaves these whole.
    """
    pieces = [_Piece(tensor.sizes, tensor.token_bytes)]
    pieces += [
        _Piece(
            {name: tensor.sizes[name] for name in extra.names if name in tensor.sizes}, extra.count * tensor.token_bytes
        )
        for extra in extras
    ]
    moved = added(*(_piece(piece, source, target, size) for piece in pieces))
    return moved if tensor.backward else [WireBytes(rank.forward, 0) for rank in moved]


def _piece(piece: _Piece, source: str | None, target: str | None, size: int) -> Sequence[WireBytes]:
    source = source if source in piece.sizes else None
    target = target if target in piece.sizes else None
    if source == target:
        return none_sent(size)
    if source is None:
        assert target is not None
        return [WireBytes(0, sent) for sent in _gathered(piece, target, size)]
    if target is None:
        return [WireBytes(sent, 0) for sent in _gathered(piece, source, size)]
    names = list(piece.sizes)
    shape = (*piece.sizes.values(), piece.nbytes)
    return [
        switch_bytes(shape, names.index(source), names.index(target), size=size, rank=rank, element_size=1)
        for rank in range(size)
    ]


def _gathered(piece: _Piece, dim: str, size: int) -> list[int]:
    """`split` gathers its gradient, `gather` its input."""
    per_entry = prod(length for name, length in piece.sizes.items() if name != dim) * piece.nbytes
    return [per_entry * local * (size - 1) for local in shard_sizes(piece.sizes[dim], size)]
