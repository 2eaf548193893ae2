"""Ways of tensors through an all-to-all: how they are packed into one buffer, and put together from what arrives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.layout import run_of, shard_ranges

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


@dataclass(frozen=True)
class Packed:
    """Tensors in one buffer, ready to leave.

    Attributes:
        buffer: 1-D, contiguous; for every rank in turn its part of each tensor. It may be a view of the one tensor.
        send_counts: elements of it for each rank.
        receive_counts: elements that come from each rank.
        whole: shapes of the tensors before they were sharded, on which ranks must agree.
        arriving: by tensor, the shape of what comes from each rank.
    """

    buffer: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    whole: list[list[int]]
    arriving: list[list[list[int]]]

    def blocks(self, received: Tensor) -> list[list[Tensor]]:
        """By tensor, what came from each rank, as views of what was received."""
        shapes = [shape for of_peer in zip(*self.arriving, strict=True) for shape in of_peer]
        slots = received.split([prod(shape) for shape in shapes])
        blocks = [slot.view(shape) for slot, shape in zip(slots, shapes, strict=True)]
        return [blocks[index :: len(self.arriving)] for index in range(len(self.arriving))]


def pack(tensors: Sequence[Tensor], routes: Sequence[Route], axis: Axis) -> Packed:
    """The tensors, one a route and of one dtype, in one buffer; each need only hold what its route sends."""
    pieces = [
        (x, route, route.scatter[peer]) for peer in range(axis.size) for x, route in zip(tensors, routes, strict=True)
    ]
    shapes = [_cut(x.shape, route.scatter_dim, runs) for x, route, runs in pieces]
    send_counts = _per_peer([prod(shape) for shape in shapes], len(tensors))
    arriving = [
        [
            _cut(_cut(x.shape, route.scatter_dim, route.scatter[axis.rank]), route.gather_dim, route.gather[peer])
            for peer in range(axis.size)
        ]
        for x, route in zip(tensors, routes, strict=True)
    ]
    receive_counts = [sum(map(prod, of_peer)) for of_peer in zip(*arriving, strict=True)]

    if len(tensors) == 1 and _leads(tensors[0].shape, routes[0].scatter_dim, routes[0].scatter):
        buffer = tensors[0].contiguous().view(-1)
    else:
        buffer = tensors[0].new_empty(sum(send_counts))
        slots = [
            slot.view(shape)
            for slot, shape in zip(buffer.split([prod(shape) for shape in shapes]), shapes, strict=True)
        ]
        for index, (x, route) in enumerate(zip(tensors, routes, strict=True)):
            _fill(slots[index :: len(tensors)], x, route)
    whole = [_with(x.shape, route.gather_dim, _length(route.gather)) for x, route in zip(tensors, routes, strict=True)]
    return Packed(buffer, send_counts, receive_counts, whole, arriving)


def assembled(received: Tensor, blocks: Sequence[list[Tensor]], routes: Sequence[Route]) -> list[Tensor]:
    """Every tensor, put together from what came from each rank; sums, where ranks send the same entries."""
    return [_assemble(received, of, route, single=len(routes) == 1) for of, route in zip(blocks, routes, strict=True)]


def lay(total: Tensor, blocks: Sequence[Tensor], route: Route, add: bool) -> None:
    """Copy what came from each rank to its place in ``total``, or add it there."""
    if not add and (at_once := _stacked(total, route.gather_dim, route.gather, blocks)) is not None:
        places, stack = at_once
        places.copy_(stack)
        return
    for target, source in _pairs(total, route.gather_dim, route.gather, blocks):
        target.add_(source) if add else target.copy_(source)


def consecutive(runs_by_rank: Sequence[Runs]) -> bool:
    """Whether the runs, rank by rank, go up from 0 without gaps."""
    runs = [run for runs in runs_by_rank for run in runs]
    return [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])] and all(run.step == 1 for run in runs)


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
    return prod(shape[:dim]) == 1 and consecutive(runs_by_rank) and shape[dim] == _length(runs_by_rank)


def _fill(slots: Sequence[Tensor], x: Tensor, route: Route) -> None:
    if (at_once := _stacked(x, route.scatter_dim, route.scatter, slots)) is not None:
        places, stack = at_once
        stack.copy_(places)
        return
    for source, slot in _pairs(x, route.scatter_dim, route.scatter, slots):
        slot.copy_(source)


def _pairs(
    x: Tensor, dim: int, runs_by_rank: Sequence[Runs], blocks: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every run of ``x`` with its part of its rank's block."""
    for block, runs in zip(blocks, runs_by_rank, strict=True):
        offset = 0
        for run in runs:
            yield run_of(x, dim, run), block.narrow(dim, offset, len(run))
            offset += len(run)


def _stacked(
    x: Tensor, dim: int, runs_by_rank: Sequence[Runs], blocks: Sequence[Tensor]
) -> tuple[Tensor, Tensor] | None:
    """The ranks' runs of ``x`` as one tensor, and their blocks as another; None where they do not lie that evenly.

    One copy then does for all ranks, which on a device are as many launches otherwise. Runs that are one stretch of
    memory each are left alone: copying those one by one is faster.
    """
    if len(blocks) < 2 or prod(x.shape[:dim]) == 1 or any(len(runs) != 1 for runs in runs_by_rank):
        return None
    runs = [runs[0] for runs in runs_by_rank]
    if len({(len(run), run.step) for run in runs}) > 1 or not blocks[0].numel():
        return None
    places, slots = [run.start for run in runs], [block.storage_offset() for block in blocks]
    pace, gap = places[1] - places[0], slots[1] - slots[0]
    if pace < 0 or any(
        (place, slot) != (places[0] + rank * pace, slots[0] + rank * gap)
        for rank, (place, slot) in enumerate(zip(places, slots, strict=True))
    ):
        return None
    first, stride = run_of(x, dim, runs[0]), pace * x.stride(dim)
    size = (len(blocks), *first.shape)
    return (
        first.as_strided(size, (stride, *first.stride()), first.storage_offset()),
        blocks[0].as_strided(size, (gap, *blocks[0].stride()), blocks[0].storage_offset()),
    )


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
    lay(total, blocks, route, add=overlapping)
    return total.to(received.dtype)
