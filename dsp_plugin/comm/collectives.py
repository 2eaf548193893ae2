"""Collectives that autograd can pass through.

The gradient contract: the global loss is the mean over ranks of their local losses, and parameter gradients are the
mean over ranks. Inside a sharded region gradients are thus P times the partial sum, which is what DeepSpeed and
Megatron-core expect, since both average over a group that contains the sequence ranks. `split`, `gather` and
`replicate` are the borders of such a region and carry the factor; everything else is its own exact adjoint. Backward
passes are made of the same collectives, so they have gradients by the same contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.wire import Sender, Transfers, collect, exchange
from dsp_plugin.derivatives import refuse_transforms
from dsp_plugin.layout import Layout, run_of, shard_ranges

Runs = tuple[range, ...]


@dataclass(frozen=True)
class Route:
    """How one tensor goes through an all-to-all: scattered along one dim, gathered along another.

    Attributes:
        scatter_dim: whole before, cut after.
        gather_dim: cut before, whole after.
        scatter: for each destination the entries of ``scatter_dim`` that it gets. They may overlap: a key/value head
            that two ranks need goes to both, and its gradients are added up.
        gather: for each source the entries of ``gather_dim`` that its local ones are, in local order.
    """

    scatter_dim: int
    gather_dim: int
    scatter: tuple[Runs, ...]
    gather: tuple[Runs, ...]

    @classmethod
    def even(cls, scatter_dim: int, gather_dim: int, scatter_length: int, gather_length: int, parts: int) -> Route:
        """The route that cuts both dims into ``parts`` contiguous runs whose sizes differ by at most one."""
        return cls(
            scatter_dim,
            gather_dim,
            tuple((run,) for run in shard_ranges(scatter_length, parts)),
            tuple((run,) for run in shard_ranges(gather_length, parts)),
        )

    def inverse(self) -> Route:
        """The route back, which is also the route of the gradient."""
        return Route(self.gather_dim, self.scatter_dim, self.gather, self.scatter)


def all_to_all(tensors: Sequence[Tensor], routes: Sequence[Route], *, axis: Axis, method: str) -> tuple[Tensor, ...]:
    """Send every tensor along its route, all of them in one collective.

    Bytes leaving this rank: those of its entries for other ranks; its own chunk is free.

    Args:
        tensors: of one dtype; each whole along its ``scatter_dim`` and local along its ``gather_dim``.
        routes: one per tensor.
        axis: the ranks that exchange.
        method: the name for the ledger.

    Returns:
        The tensors, local along ``scatter_dim`` and whole along ``gather_dim``.
    """
    assert len(tensors) == len(routes)
    assert len({x.dtype for x in tensors}) == 1
    if axis.size == 1 and all(
        _consecutive(route.gather) and route.scatter[0] == (range(x.shape[route.scatter_dim]),)
        for x, route in zip(tensors, routes, strict=True)
    ):
        return tuple(tensors)
    refuse_transforms("an all-to-all", *tensors)
    return _AllToAll.apply(Sender(axis, method, "forward"), tuple(routes), *tensors)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sender: Sender, routes: tuple[Route, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.sender, ctx.routes = sender, routes
        ctx.set_materialize_grads(True)
        return _route(tensors, routes, sender)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        inverses = tuple(route.inverse() for route in ctx.routes)
        return None, None, *_AllToAll.apply(ctx.sender.backward(), inverses, *grads)


def _route(tensors: Sequence[Tensor], routes: Sequence[Route], sender: Sender) -> tuple[Tensor, ...]:
    axis = sender.axis
    pieces = [
        (x, route, route.scatter[peer]) for peer in range(axis.size) for x, route in zip(tensors, routes, strict=True)
    ]
    shapes = [_cut(x.shape, route.scatter_dim, runs) for x, route, runs in pieces]
    send_counts = _per_peer([prod(shape) for shape in shapes], len(tensors))
    arriving = [
        _cut(_cut(x.shape, route.scatter_dim, route.scatter[axis.rank]), route.gather_dim, route.gather[peer])
        for peer in range(axis.size)
        for x, route in zip(tensors, routes, strict=True)
    ]
    receive_counts = _per_peer([prod(shape) for shape in arriving], len(tensors))

    if len(tensors) == 1 and _leads(tensors[0].shape, routes[0].scatter_dim, routes[0].scatter):
        packed = tensors[0].contiguous().view(-1)
    else:
        packed = tensors[0].new_empty(sum(send_counts))
        slots = packed.split([prod(shape) for shape in shapes])
        for (x, route, runs), shape, slot in zip(pieces, shapes, slots, strict=True):
            _fill(slot.view(shape), x, route.scatter_dim, runs)
    whole = [_with(x.shape, route.gather_dim, _length(route.gather)) for x, route in zip(tensors, routes, strict=True)]
    received = exchange(packed, send_counts, receive_counts, sender, whole)

    blocks = [
        slot.view(shape)
        for slot, shape in zip(received.split([prod(shape) for shape in arriving]), arriving, strict=True)
    ]
    return tuple(
        _assemble(received, blocks[index :: len(tensors)], route, single=len(tensors) == 1)
        for index, route in enumerate(routes)
    )


def _with(shape: Sequence[int], dim: int, length: int) -> list[int]:
    changed = list(shape)
    changed[dim] = length
    return changed


def _cut(shape: Sequence[int], dim: int, runs: Runs) -> list[int]:
    return _with(shape, dim, sum(map(len, runs)))


def _length(runs_by_rank: Sequence[Runs]) -> int:
    """Of the dim that the runs, which may overlap, cover."""
    return max((run[-1] + 1 for runs in runs_by_rank for run in runs if len(run)), default=0)


def _per_peer(counts: list[int], tensors: int) -> list[int]:
    return [sum(counts[start : start + tensors]) for start in range(0, len(counts), tensors)]


def _leads(shape: Sequence[int], dim: int, runs_by_rank: Sequence[Runs]) -> bool:
    """Whether memory order is already rank order along ``dim``, so that packing or unpacking can be skipped."""
    return prod(shape[:dim]) == 1 and _consecutive(runs_by_rank)


def _consecutive(runs_by_rank: Sequence[Runs]) -> bool:
    runs = [run for runs in runs_by_rank for run in runs]
    return [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])] and all(run.step == 1 for run in runs)


def _fill(slot: Tensor, x: Tensor, dim: int, runs: Runs) -> None:
    offset = 0
    for run in runs:
        slot.narrow(dim, offset, len(run)).copy_(run_of(x, dim, run))
        offset += len(run)


def _assemble(received: Tensor, blocks: list[Tensor], route: Route, single: bool) -> Tensor:
    dim = route.gather_dim
    length = _length(route.gather)
    shape = _with(blocks[0].shape, dim, length)
    if single and _leads(shape, dim, route.gather):
        return received.view(shape)
    overlapping = sum(len(run) for runs in route.gather for run in runs) > length
    if overlapping:
        # Sums of several ranks' gradients: bfloat16 would lose what each of them kept.
        total = received.new_zeros(shape, dtype=torch.promote_types(received.dtype, torch.float32))
    else:
        total = received.new_empty(shape)
    for block, runs in zip(blocks, route.gather, strict=True):
        offset = 0
        for run in runs:
            target, source = run_of(total, dim, run), block.narrow(dim, offset, len(run))
            target.add_(source) if overlapping else target.copy_(source)
            offset += len(run)
    return total.to(received.dtype)


def all_gather(x: Tensor, dim: int, layout: Layout, *, axis: Axis, method: str) -> Tensor:
    """The whole tensor on every rank, where ranks go on to do different things with it.

    Backward is a reduce-scatter (sum). Bytes leaving this rank: (P-1) * its shard forward, its gradient less the own
    part backward.

    Args:
        x: this rank's shard along ``dim`` under ``layout``.
    """
    refuse_transforms("an all-gather", x)
    return x if axis.size == 1 else _AllGather.apply(x, dim, layout, Sender(axis, method, "forward"))


def reduce_scatter(x: Tensor, dim: int, layout: Layout, *, axis: Axis, method: str) -> Tensor:
    """This rank's shard of the sum over ranks of ``x``; backward is an all-gather.

    The sum is taken in fp32 or wider, in rank order, so it does not depend on the backend.

    Args:
        x: whole along ``dim``.
    """
    refuse_transforms("a reduce-scatter", x)
    return x if axis.size == 1 else _ReduceScatter.apply(x, dim, layout, Sender(axis, method, "forward"))


def split(x: Tensor, dim: int, layout: Layout, *, axis: Axis, method: str) -> Tensor:
    """Enter a sharded region with a tensor that every rank holds whole; this rank keeps its shard.

    Backward is an all-gather divided by P, which leaves every rank with the exact gradient of ``x``.
    """
    refuse_transforms("a split", x)
    return x if axis.size == 1 else _Split.apply(x, dim, layout, Sender(axis, method, "forward"))


def gather(x: Tensor, dim: int, layout: Layout, *, axis: Axis, method: str) -> Tensor:
    """Leave a sharded region: the whole tensor on every rank, where all ranks go on to do the same with it.

    Backward is this rank's slice times P, and sends nothing. Where ranks differ in what follows, use `all_gather`.
    """
    refuse_transforms("a gather", x)
    return x if axis.size == 1 else _Gather.apply(x, dim, layout, Sender(axis, method, "forward"))


def replicate(x: Tensor, *, axis: Axis, method: str) -> Tensor:
    """Take a tensor that every rank holds whole into a sharded region, whole (text tokens, a class token).

    Backward is the mean over ranks, which leaves every rank with the exact gradient of ``x``: the tensor counts once.
    Not needed for parameter gradients, which the framework averages anyway; needed where ranks must agree on the
    gradient of the tensor itself.
    """
    refuse_transforms("a replication", x)
    return x if axis.size == 1 else _Replicate.apply(x, Sender(axis, method, "forward"))


def ring_hop(x: Tensor, shift: int, receive_shape: Sequence[int] | None = None, *, axis: Axis, method: str) -> Tensor:
    """Send ``x`` to the rank ``shift`` places on, receive from the one as far back; backward hops the other way.

    Args:
        receive_shape: shape of what arrives, where it differs from that of ``x``.
    """
    if shift % axis.size == 0:
        return x
    shape = tuple(x.shape if receive_shape is None else receive_shape)
    refuse_transforms("a hop", x)
    return _RingHop.apply(x, shift, shape, Sender(axis, method, "forward"))


def summed(x: Tensor, sender: Sender) -> Tensor:
    """The sum of ``x`` over the ranks, on every rank; not for autograd to pass through.

    Bytes leaving this rank: those of the parts that others add up, and P - 1 times those of its own.
    """
    flat = Layout("contiguous", x.numel(), sender.axis.size)
    return _gathered(_reduced(x.reshape(-1), 0, flat, sender), 0, flat, sender).view(x.shape)


def _gathered(x: Tensor, dim: int, layout: Layout, sender: Sender) -> Tensor:
    assert layout.size == sender.axis.size
    assert x.shape[dim] == layout.sizes[sender.axis.rank]
    shapes = [_with(x.shape, dim, size) for size in layout.sizes]
    whole = [_with(x.shape, dim, layout.length)]
    parts = collect(x.contiguous().view(-1), [prod(shape) for shape in shapes], sender, whole)
    return layout.unshard([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], dim)


def _reduced(x: Tensor, dim: int, layout: Layout, sender: Sender) -> Tensor:
    """Every rank's part of ``x`` goes straight to its owner, who adds up what arrives."""
    axis = sender.axis
    shards = [layout.shard(x, dim, peer).contiguous() for peer in range(axis.size)]
    mine = shards[axis.rank]
    packed = torch.cat([shard.view(-1) for shard in shards])
    received = exchange(packed, [shard.numel() for shard in shards], [mine.numel()] * axis.size, sender, [x.shape])
    wide = torch.promote_types(x.dtype, torch.float32)
    return received.view(axis.size, *mine.shape).sum(0, dtype=wide).to(x.dtype)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, layout: Layout, sender: Sender) -> Tensor:
        ctx.args = dim, layout, sender.backward()
        return _gathered(x, dim, layout, sender)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _ReduceScatter.apply(grad, *ctx.args), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, layout: Layout, sender: Sender) -> Tensor:
        ctx.args = dim, layout, sender.backward()
        return _reduced(x, dim, layout, sender)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _AllGather.apply(grad, *ctx.args), None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, layout: Layout, sender: Sender) -> Tensor:
        ctx.args = dim, layout, sender.backward()
        # A copy, so that the whole tensor can be freed while its shard lives on.
        return layout.shard(x, dim, sender.axis.rank).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sender = ctx.args[-1]
        return _Gather.apply(grad, *ctx.args) / sender.axis.size, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, layout: Layout, sender: Sender) -> Tensor:
        ctx.args = dim, layout, sender.backward()
        return _gathered(x, dim, layout, sender)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        dim, layout, sender = ctx.args
        if torch.is_grad_enabled():
            return _Split.apply(grad, *ctx.args) * sender.axis.size, None, None, None
        return layout.shard(grad, dim, sender.axis.rank) * sender.axis.size, None, None, None


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sender: Sender) -> Tensor:
        ctx.sender = sender.backward()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Mean.apply(grad, ctx.sender), None


class _Mean(torch.autograd.Function):
    """Of the gradients of a tensor that all ranks held whole: one gradient, which all of them hold whole."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, sender: Sender) -> Tensor:
        ctx.sender = sender
        return summed(grad, sender) / sender.axis.size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Replicate.apply(grad, ctx.sender), None


class _RingHop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: int, receive_shape: tuple[int, ...], sender: Sender) -> Tensor:
        ctx.shape, ctx.shift, ctx.sender = x.shape, shift, sender.backward()
        return _hopped(x, shift, receive_shape, sender)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _RingHop.apply(grad, -ctx.shift, tuple(ctx.shape), ctx.sender), None, None, None


def _hopped(x: Tensor, shift: int, receive_shape: Sequence[int], sender: Sender) -> Tensor:
    axis = sender.axis
    to, origin = (axis.rank + shift) % axis.size, (axis.rank - shift) % axis.size
    sends = {to: x.contiguous().view(-1)}
    return Transfers(sends, {origin: prod(receive_shape)}, x, "ring_hop", sender).wait()[origin].view(*receive_shape)
