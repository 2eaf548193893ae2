"""The same tokens in another layout: one all-to-all that carries each token to the rank that holds it there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.strides import side_by_side
from dsp_plugin.comm.wire import Sender, exchange
from dsp_plugin.derivatives import refuse_transforms
from dsp_plugin.integers import kept_on_device
from dsp_plugin.layout import Layout


def relayout(
    tensors: Sequence[Tensor], dim: int, source: Layout, target: Layout, *, axis: Axis, method: str
) -> tuple[Tensor, ...]:
    """This rank's shards under ``target`` from its shards under ``source``; the gradients go back the same way.

    One all-to-all per dtype. Bytes leaving this rank: those of the tokens that another rank holds under ``target``,
    see `relayout_bytes`; backward alike with the layouts swapped, of the tensors that need a gradient. Layouts that
    place every token on the same rank at the same place send nothing.

    Args:
        tensors: of any dtypes and numbers of dims; ``source.sizes[rank]`` entries along ``dim``.
        dim: the sequence dim of all of them; negative counts from the back.
        source: where the tokens are.
        target: where they go; of the same length and size.
        axis: the ranks of the layouts.
        method: the name for the ledger.

    Returns:
        The tensors in the order given, ``target.sizes[rank]`` entries along ``dim``.
    """
    assert source.size == target.size == axis.size
    assert source.length == target.length
    assert all(x.shape[dim] == source.sizes[axis.rank] for x in tensors)
    if _same_places(source, target):
        return tuple(tensors)
    move = _Move(dim, source, target, Sender(axis, method, "forward"))
    refuse_transforms("a relayout", *tensors)
    moved: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        chosen = [index for index, x in enumerate(tensors) if x.dtype == dtype]
        group = [tensors[index] for index in chosen]
        arrived = _Relayout.apply(move, *group) if dtype.is_floating_point or dtype.is_complex else _moved(group, move)
        moved |= zip(chosen, arrived, strict=True)
    return tuple(moved[index] for index in range(len(tensors)))


def relayout_bytes(source: Layout, target: Layout, rank: int, per_token_bytes: int) -> int:
    """Bytes leaving ``rank`` when tokens of ``per_token_bytes`` bytes each go from ``source`` to ``target``."""
    if source.size == 1:
        return 0
    staying = np.isin(source.runs(rank).positions(), target.runs(rank).positions()).sum()
    return (source.sizes[rank] - int(staying)) * per_token_bytes


def _same_places(source: Layout, target: Layout) -> bool:
    """Whether no token moves. Alone on its axis a rank holds all tokens in order, whatever the kind of layout."""
    if source.size == 1 or source == target:
        return True
    if source.sizes != target.sizes:
        return False
    places = ((source.runs(rank), target.runs(rank)) for rank in range(source.size))
    return all(all(map(np.array_equal, mine, theirs)) for mine, theirs in places)


class _Move(NamedTuple):
    dim: int
    source: Layout
    target: Layout
    sender: Sender

    def back(self) -> _Move:
        """The way of the gradient."""
        return _Move(self.dim, self.target, self.source, self.sender.backward())


class _Relayout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, move: _Move, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.move = move
        ctx.set_materialize_grads(True)
        return _moved(tensors, move)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = [index for index in range(len(grads)) if ctx.needs_input_grad[1 + index]]
        moved = dict(zip(needed, _Relayout.apply(ctx.move.back(), *(grads[index] for index in needed)), strict=True))
        return None, *(moved.get(index) for index in range(len(grads)))


def _moved(tensors: Sequence[Tensor], move: _Move) -> tuple[Tensor, ...]:
    """The tensors, of one dtype, in one exchange: a row per token, all tensors' entries of the token side by side."""
    dim, axis = move.dim, move.sender.axis
    _, _, send_counts, receive_counts = _indices(move.source, move.target, axis.rank)
    order, place = _order_and_place(move.source, move.target, axis.rank, device=tensors[0].device)
    whole = [[*x.shape] for x in tensors]
    for shape in whole:
        shape[dim] = move.source.length
    by_token = [x.movedim(dim, 0) for x in tensors]
    rests = [x.shape[1:] for x in by_token]
    widths = [prod(rest) for rest in rests]
    width = sum(widths)
    # Several tensors are brought together first: their tokens are then picked by one launch.
    rows = by_token[0] if len(by_token) == 1 else side_by_side(by_token, 1)
    packed = rows.index_select(0, order).view(-1)
    received = exchange(
        packed, [n * width for n in send_counts], [n * width for n in receive_counts], move.sender, whole
    ).view(len(place), width)
    return tuple(
        part.unflatten(1, rest).movedim(0, dim).index_select(dim, place)
        if rest
        else part.view(len(place)).index_select(0, place)
        for part, rest in zip(received.split(widths, 1), rests, strict=True)
    )


class _Indices(NamedTuple):
    """How one rank packs and unpacks.

    Attributes:
        order: int64, local index under ``source`` of the rows to send, by destination.
        place: int64, the row that arrives, by local index under ``target``.
        send_counts: rows for each rank.
        receive_counts: rows from each rank.
    """

    order: NDArray[np.int64]
    place: NDArray[np.int64]
    send_counts: list[int]
    receive_counts: list[int]


# Few: with packed documents the layouts of every batch are others, and the indices of a long shard are not small.
@lru_cache(maxsize=16)
def _indices(source: Layout, target: Layout, rank: int) -> _Indices:
    # Every layout lists a rank's tokens by position, so what goes from one rank to another has one order on both.
    to = _holders(target)[source.runs(rank).positions()]
    origin = _holders(source)[target.runs(rank).positions()]
    arriving = np.argsort(origin, kind="stable")
    place = np.empty_like(arriving)
    place[arriving] = np.arange(len(arriving))
    return _Indices(
        np.argsort(to, kind="stable"),
        place,
        np.bincount(to, minlength=source.size).tolist(),
        np.bincount(origin, minlength=source.size).tolist(),
    )


@kept_on_device
def _order_and_place(source: Layout, target: Layout, rank: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    found = _indices(source, target, rank)
    return found.order, found.place


def _holders(layout: Layout) -> NDArray[np.int64]:
    """The rank that holds each token: ``[L]``."""
    ranks = np.empty(layout.length, dtype=np.int64)
    for rank in range(layout.size):
        ranks[layout.runs(rank).positions()] = rank
    return ranks
