"""Move the sharding of one tensor from one dim to another by one exchange, with one copy of the shard.

Which of the two dims is first decides what is copied. If it is the gathered one, every rank packs its blocks, and what
arrives, in rank order, is in place. If it is the scattered one, a contiguous tensor is sent as it is, and what arrives
is unpacked. A dim in front of both would take a second copy, or an exchange for each of its entries: where there is
one, the gathered dim is put first in memory instead. The blocks of all ranks of one size are copied in one launch.

All of this depends on shapes, never on strides, which may differ between ranks where a dim has one entry.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.wire import Exchange, Sender
from dsp_plugin.derivatives import refuse_transforms
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.layout import shard_sizes


@dataclass(frozen=True)
class Turn:
    """From which dim to which the sharding moves, and the sizes of both on every rank.

    Attributes:
        scatter_dim: whole before, cut after.
        gather_dim: cut before, whole after.
        scatter_sizes: of every rank's part of ``scatter_dim`` after.
        gather_sizes: of every rank's part of ``gather_dim`` before.
    """

    scatter_dim: int
    gather_dim: int
    scatter_sizes: tuple[int, ...]
    gather_sizes: tuple[int, ...]

    @classmethod
    def even(cls, scatter_dim: int, gather_dim: int, scatter_length: int, gather_length: int, parts: int) -> Turn:
        """Both dims cut into ``parts`` sizes that differ by at most one."""
        return cls(scatter_dim, gather_dim, shard_sizes(scatter_length, parts), shard_sizes(gather_length, parts))

    def inverse(self) -> Turn:
        """The turn back, which is also that of the gradient."""
        return Turn(self.gather_dim, self.scatter_dim, self.gather_sizes, self.scatter_sizes)


class PendingSwitch:
    """A switch under way: `wait` returns its result, and work that does not need it can be done before.

    The backward pass mirrors it: the gradient's exchange starts when the gradient of the result is there, and is waited
    for where the switch was started, so it hides behind the gradients of the same work.

    ``x`` must not be written to before `wait`: it may be sent as it lies, and it is kept alive until then. All ranks
    start the same switches in the same order; any number may be under way, and be waited for in any order. One that is
    never waited for is not an error: what it sends arrives, is counted and dropped, and ``x`` gets no gradient by it.
    """

    def __init__(self, x: Tensor, turn: Turn, *, axis: Axis, method: str) -> None:
        self._result: Tensor | None = None
        if axis.size == 1:
            self._result = x
            return
        refuse_transforms("a switch", x)
        self._crossing = _Crossing(turn, Sender(axis, method, "forward"))
        self._token = _Depart.apply(x, self._crossing)

    def wait(self) -> Tensor:
        """The tensor, whole along the dim that was cut and cut along the one that was whole; every time the same.

        Raises:
            SequenceParallelConfigError: the tensor was written to since the start.
        """
        if self._result is None:
            self._result = _Arrive.apply(self._token, self._crossing)
        return self._result


class _Flight:
    """One tensor on its way."""

    def __init__(self, x: Tensor, turn: Turn, sender: Sender) -> None:
        self._source, self._version = x, _version(x)
        self._order = _memory_order(x.shape, turn)
        scatter, self._gather = self._order.index(turn.scatter_dim), self._order.index(turn.gather_dim)
        whole = _with(x.shape, turn.gather_dim, sum(turn.gather_sizes))
        self._shape = _with(whole, turn.scatter_dim, turn.scatter_sizes[sender.axis.rank])
        self._sizes = turn.gather_sizes

        x = x.permute(self._order)
        send_counts = _counts(x.shape, scatter, turn.scatter_sizes)
        receive_counts = _counts([self._shape[dim] for dim in self._order], self._gather, turn.gather_sizes)
        self._result: Tensor | None = None
        if scatter < self._gather:
            buffer = x.contiguous().view(-1)
            self._received = x.new_empty(sum(receive_counts))
        else:
            buffer = x.new_empty(sum(send_counts))
            for slots, blocks in _stacks(buffer, x, scatter, turn.scatter_sizes):
                slots.copy_(blocks)
            self._result = self._empty()
            self._received = self._result.permute(self._order).view(-1)
        self._exchange = Exchange(buffer, self._received, send_counts, receive_counts, sender, [whole])

    def wait(self) -> Tensor:
        """What arrived; to be called once."""
        self._exchange.wait()
        if self._version != _version(self._source):
            raise SequenceParallelConfigError(
                setting="switch",
                value=f"a tensor {tuple(self._source.shape)}",
                why="it was written to in place between the start of its switch and the wait, while it was being sent",
                remedy="write to it after the wait, or to a clone",
            )
        if self._result is None:
            self._result = self._empty()
            ordered = self._result.permute(self._order)
            for slots, blocks in _stacks(self._received, ordered, self._gather, self._sizes):
                blocks.copy_(slots)
        return self._result

    def _empty(self) -> Tensor:
        # Not a view of a buffer: autograd lets nobody write to a view that a function returns.
        like = self._source
        return torch.empty_permuted(self._shape, self._order, dtype=like.dtype, device=like.device)


def _memory_order(shape: Sequence[int], turn: Turn) -> list[int]:
    order = list(range(len(shape)))
    if prod(shape[: min(turn.scatter_dim, turn.gather_dim)]) > 1:
        order.insert(0, order.pop(turn.gather_dim))
    return order


def _counts(shape: Sequence[int], dim: int, sizes: Sequence[int]) -> list[int]:
    """Elements of each block that a tensor is cut into along ``dim``."""
    return [prod(_with(shape, dim, size)) for size in sizes]


def _stacks(buffer: Tensor, x: Tensor, dim: int, sizes: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The blocks of ``x`` along ``dim``, neighbours of one size stacked, each stack after its place in the buffer."""
    filled = start = 0
    for size, run in groupby(sizes):
        count = len(list(run))
        blocks = x.narrow(dim, start, count * size).unflatten(dim, (count, size)).movedim(dim, 0)
        if blocks.numel():
            yield buffer.narrow(0, filled, blocks.numel()).view(blocks.shape), blocks
        start, filled = start + count * size, filled + blocks.numel()


def _with(shape: Sequence[int], dim: int, length: int) -> list[int]:
    return [*shape[:dim], length, *shape[dim + 1 :]]


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version


class _Crossing:
    """What the two ends of a switch share: the tensor on its way there, the crossing of the gradient back."""

    def __init__(self, turn: Turn, sender: Sender) -> None:
        self._turn, self._sender = turn, sender
        self._flight: _Flight | None = None
        self._back: _Crossing | None = None

    def depart(self, x: Tensor) -> None:
        self._flight = _Flight(x, self._turn, self._sender)

    def turn_back(self) -> _Crossing:
        """The way of a gradient, which `on_the_way_back` gives once."""
        self._back = _Crossing(self._turn.inverse(), self._sender.backward())
        return self._back

    def on_the_way_back(self) -> _Crossing:
        back, self._back = self._back, None
        assert back is not None
        return back

    def arrive(self) -> Tensor:
        # Not kept: the result leads to this object through its graph, and the two would keep each other alive.
        flight, self._flight = self._flight, None
        assert flight is not None
        return flight.wait()


class _Depart(torch.autograd.Function):
    """Its output is an empty token, which only ties the two ends together in the graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        crossing.depart(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, token: Tensor) -> tuple[Any, ...]:
        return _Arrive.apply(token, ctx.crossing.on_the_way_back()), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _token: Tensor, crossing: _Crossing) -> Tensor:
        ctx.crossing = crossing
        return crossing.arrive()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Depart.apply(grad, ctx.crossing.turn_back()), None
