"""How tensors of an all-to-all lie in its buffers, worked out once for all calls with the same routes and shapes.

Of the dim that is scattered and the one that is gathered, the first is called rows here, the second columns (tokens
and heads, in attention). A row of a buffer has all tensors' columns side by side, and rows are outermost:

- Where a rank has all rows of its own columns, a buffer is ``[rows, between, columns]``, the rows of one peer after
  those of another. If the peers' rows are in order nothing is packed and nothing unpacked: the tensors are views.
- Where it has its own rows of all columns, a buffer is a block ``[rows, between, columns of the peer]`` for every peer.

``between`` are the other dims in front of the columns. So a tensor moves in one launch and several in one or two,
however many ranks there are; see `by_row` and `by_peer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.by_peer import ByPeer
from dsp_plugin.comm.by_row import ByRow
from dsp_plugin.comm.routes import Route, length_of


@dataclass(frozen=True)
class Plan:
    """Of the tensors of one exchange on one rank.

    Attributes:
        send_counts: elements of the buffer for each rank.
        receive_counts: elements that come from each rank.
        whole: shapes of the tensors before they were sharded, on which ranks must agree.
        leaving, arriving: how they lie on both sides.
        swapped: two dims of the tensors that change places on both sides, if any.
    """

    send_counts: list[int]
    receive_counts: list[int]
    whole: list[list[int]]
    leaving: ByRow | ByPeer
    arriving: ByRow | ByPeer
    swapped: tuple[int, int] | None = None

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The buffer to send: 1-D, contiguous; it may be a view of the only tensor."""
        return self.leaving.pack(self._swap(tensors))

    def room(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Where what arrives is put, and that with what `unpack` needs to have behind it."""
        count, behind = sum(self.receive_counts), self.arriving.behind
        room = like.new_empty(count + behind)
        if behind:
            room[count:].zero_()
        return room[:count], room

    def unpack(self, room: Tensor) -> list[Tensor]:
        """The tensors that arrived: of their own, or views of the buffer or of one of their own."""
        return self._swap(self.arriving.unpack(room))

    def _swap(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors) if self.swapped is None else [x.transpose(*self.swapped) for x in tensors]


@dataclass(frozen=True)
class Packed:
    """Tensors in one buffer, ready to leave, and what it was packed by."""

    buffer: Tensor
    plan: Plan


def pack(tensors: Sequence[Tensor], routes: Sequence[Route], axis: Axis) -> Packed:
    """The tensors, one a route and of one dtype, in one buffer; each need only hold what its route sends.

    Args:
        tensors: as for `all_to_all`.
        routes: as for `all_to_all`.
    """
    plan = plan_of(tuple(routes), tuple(x.shape for x in tensors), axis.rank)
    return Packed(plan.pack(tensors), plan)


@lru_cache(maxsize=256)
def plan_of(routes: tuple[Route, ...], shapes: tuple[torch.Size, ...], rank: int) -> Plan:
    """The plan of tensors of these shapes, as they are before the exchange."""
    scatter, gather = routes[0].scatter_dim, routes[0].gather_dim
    assert {(route.scatter_dim, route.gather_dim) for route in routes} == {(scatter, gather)}
    whole = [_with(shape, gather, length_of(route.gather)) for shape, route in zip(shapes, routes, strict=True)]
    row, column = sorted((scatter, gather))
    swapped = None
    if not _alike([route.scatter if scatter == row else route.gather for route in routes]):
        # Rows are those of all tensors.
        swapped, scatter, gather = (row, column), gather, scatter
        shapes = tuple(_swap(shape, row, column) for shape in shapes)
    assert len({shape[:column] for shape in shapes}) == 1, shapes
    by_columns = scatter == column
    own = sum(map(len, routes[0].scatter[rank]))
    lead, tails = tuple(shapes[0][:column]), tuple(tuple(shape[column + 1 :]) for shape in shapes)
    rows = routes[0].gather if by_columns else routes[0].scatter
    assert _alike([route.gather if by_columns else route.scatter for route in routes])
    columns = tuple(route.scatter if by_columns else route.gather for route in routes)
    local = shapes if by_columns else tuple(torch.Size(_with(shape, row, own)) for shape in shapes)
    mine = tuple(sum(map(len, of[rank])) for of in columns) if by_columns else tuple(shape[column] for shape in shapes)
    by_peer, by_row = ByPeer(row, local, column, columns), ByRow(row, lead, tails, mine, rows)
    leaving, arriving = (by_peer, by_row) if by_columns else (by_row, by_peer)
    return Plan(leaving.counts, arriving.counts, whole, leaving, arriving, swapped)


def _alike(runs: Sequence[object]) -> bool:
    return all(of is runs[0] or of == runs[0] for of in runs)


def _swap(shape: torch.Size, one: int, other: int) -> torch.Size:
    swapped = list(shape)
    swapped[one], swapped[other] = swapped[other], swapped[one]
    return torch.Size(swapped)


def _with(shape: Sequence[int], dim: int, length: int) -> list[int]:
    return [*shape[:dim], length, *shape[dim + 1 :]]
