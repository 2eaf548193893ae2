"""Collectives that autograd can pass through.

The gradient contract: the global loss is the mean over ranks of their local losses, and parameter gradients are the
mean over ranks. Inside a sharded region gradients are thus P times the partial sum, which is what DeepSpeed and
Megatron-core expect, since both average over a group that contains the sequence ranks. `split`, `gather` and
`replicate` are the borders of such a region and carry the factor; everything else is its own exact adjoint. Backward
passes are made of the same collectives, so they have gradients by the same contract.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.by_row import ByRow
from dsp_plugin.comm.plan import pack
from dsp_plugin.comm.routes import Route, consecutive
from dsp_plugin.comm.strides import added_up
from dsp_plugin.comm.wire import Sender, Transfers, collect, exchange
from dsp_plugin.derivatives import refuse_transforms
from dsp_plugin.layout import Layout


def all_to_all(tensors: Sequence[Tensor], routes: Sequence[Route], *, axis: Axis, method: str) -> tuple[Tensor, ...]:
    """Send every tensor along its route, all of them in one collective.

    Bytes leaving this rank: those of its entries for other ranks; its own chunk is free.

    Args:
        tensors: of one dtype; each whole along its ``scatter_dim`` and local along its ``gather_dim``; alike in all
            dims in front of the later one of the two.
        routes: one per tensor, between the same dims, with the same runs along one of them.
        axis: the ranks that exchange.
        method: the name for the ledger.

    Returns:
        The tensors, local along ``scatter_dim`` and whole along ``gather_dim``; in the order of memory that they
        arrived in, where it is of use, which may be that of one buffer for all of them.
    """
    assert len(tensors) == len(routes)
    assert len({x.dtype for x in tensors}) == 1
    if axis.size == 1 and all(
        consecutive(route.gather) and route.scatter[0] == (range(x.shape[route.scatter_dim]),)
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
    packed = pack(tensors, routes, sender.axis)
    plan = packed.plan
    received, room = plan.room(packed.buffer)
    exchange(packed.buffer, plan.send_counts, plan.receive_counts, sender, plan.whole, into=received)
    return tuple(plan.unpack(room))


def _with(shape: Sequence[int], dim: int, length: int) -> list[int]:
    changed = list(shape)
    changed[dim] = length
    return changed


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
    owned = _by_owner(x.shape, dim, layout)
    mine = _with(x.shape, dim, layout.sizes[axis.rank])
    packed = owned.pack((x[..., None],))
    received = exchange(packed, owned.counts, [prod(mine)] * axis.size, sender, [x.shape])
    rest = mine[:dim] + mine[dim + 1 :]
    total = added_up(received.view(axis.size, mine[dim], *rest), x.dtype)
    return total.movedim(0, dim).contiguous()


@lru_cache(maxsize=64)
def _by_owner(shape: torch.Size, dim: int, layout: Layout) -> ByRow:
    """A tensor of one column, whose rows go to the ranks that hold them."""
    return ByRow(dim, tuple(shape), ((),), (1,), tuple(layout.spans(rank) for rank in range(layout.size)))


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
        shard = layout.shard(x, dim, sender.axis.rank)
        # Not a view: the whole tensor can be freed while its shard lives on.
        return shard.clone() if shard.untyped_storage()._cdata == x.untyped_storage()._cdata else shard

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
