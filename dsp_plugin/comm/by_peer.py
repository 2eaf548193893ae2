"""Buffers of some rows of all columns, a block for every peer: one launch packs or unpacks them all.

Where the peers' columns are runs of one length and an even pace, the blocks are one strided view of each tensor. Else
what is picked is told by an index of units, each as many elements as one column has, kept on the device: four bytes for
every unit.

CUDA's ``cat`` takes up to 64 strided tensors of up to 4 dims in one launch: beyond 21 peers q, k and v are unpacked in
more, and with a batch and a key/value head for several ranks, which make 5 dims, packed in one each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from math import gcd, prod
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsp_plugin.comm.routes import Runs, entries
from dsp_plugin.comm.strides import added_up, layers, side_by_side
from dsp_plugin.integers import kept_on_device


class _Pace(NamedTuple):
    """Runs of peer ``i * inner + j`` start at ``first + i * outer_step + j * inner_step``."""

    first: int
    outer_step: int
    inner_step: int
    length: int


class ByPeer:
    """Tensors ``[..., rows, ..., columns, ...]`` and a buffer of ``[rows, between, columns of the peer]`` a peer.

    Args:
        row: the dim of the rows.
        shapes: of the tensors before they are packed; of what is unpacked, what they have for the columns does not
            matter.
        column: the dim of the columns.
        columns: by tensor and peer, which it gets. A column of several peers is theirs all; what comes of it from them
            is added up.

    Attributes:
        counts: elements of the buffer by peer.
        behind: elements of value 0 that `unpack` needs behind the buffer.
    """

    def __init__(
        self, row: int, shapes: tuple[torch.Size, ...], column: int, columns: tuple[tuple[Runs, ...], ...]
    ) -> None:
        self._column, self._columns = column, columns
        self._lead = tuple(shapes[0][:column])
        self._order = (row, *(dim for dim in range(column) if dim != row))
        self._held = [shape[column] for shape in shapes]
        self._tails = [tuple(shape[column + 1 :]) for shape in shapes]
        self._elements = [prod(tail) for tail in self._tails]
        self._unit = max(gcd(*self._elements), 1)
        self._given = [[sum(map(len, runs)) for runs in of] for of in columns]
        self._widths = [
            sum(count * elements for count, elements in zip(of_peer, self._elements, strict=True))
            for of_peer in zip(*self._given, strict=True)
        ]
        self.counts = [prod(self._lead) * width for width in self._widths]

        by_turn = [np.concatenate([entries(runs) for runs in of]) for of in columns]
        self._found = [np.unique(of) for of in by_turn]
        inner, self._paces = _even(columns)
        front = [len(self._widths) // inner, inner, *(self._lead[dim] for dim in self._order)]
        self._kept = [place for place, size in enumerate(front) if size != 1]
        self._front = [front[place] for place in self._kept]
        in_turn = all(np.array_equal(of, np.arange(len(of))) for of in by_turn)
        # What is unpacked: by strides, or by an index of as many layers for each tensor.
        self._layers = [] if self._paces and in_turn else [int(np.bincount(of).max(initial=1)) for of in by_turn]
        lacking = any(
            count * len(found) > len(of)
            for count, found, of in zip(self._layers, self._found, by_turn, strict=bool(self._layers))
        )
        self.behind = self._unit if self._layers and lacking else 0

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The buffer; a view of the only tensor where that lies as the buffer does."""
        if self._paces:
            views = [self._spread(x, pace) for x, pace in zip(tensors, self._paces, strict=True)]
            return side_by_side(views, len(self._front)).view(-1)
        (index,) = _sent(self, device=tensors[0].device)
        return side_by_side(tensors, self._column).view(-1, self._unit).index_select(0, index).view(-1)

    def unpack(self, received: Tensor, *, wide: bool = False) -> list[Tensor]:
        """The tensors, of their own or as views of one buffer; of the columns those that came, in order.

        Args:
            received: with what is `behind` it.
            wide: sums stay in fp32 or wider.
        """
        if self._layers:
            return self._picked(received, wide)
        if len(self._tails) == 1:
            total = received.new_empty(*self._lead, len(self._found[0]), *self._tails[0])
            self.lay((total,), received)
            return [total]
        ranks, rows = len(self._widths), [self._lead[dim] for dim in self._order]
        blocks = received.view(ranks, *rows, self._widths[0])
        back = [1 + self._order.index(dim) for dim in range(self._column)]
        parts = blocks.permute(*back, 0, -1).split(
            [given[0] * elements for given, elements in zip(self._given, self._elements, strict=True)], -1
        )
        fused = torch.cat([block for part in parts for block in part.unbind(-2)], -1)
        return self._cut(fused, range(len(self._tails)))

    def lay(self, totals: Sequence[Tensor], received: Tensor, add: Sequence[bool] = ()) -> None:
        """Copy what came to its columns in the tensors, or add it there.

        Args:
            totals: with all of their columns; those that are added to in the dtype of sums.
            received: as for `unpack`.
            add: for every tensor, whether.
        """
        add = add or (False,) * len(totals)
        if self._paces and not any(add):
            widths = [pace.length * elements for pace, elements in zip(self._paces, self._elements, strict=True)]
            parts = received.view(*self._front, self._widths[0]).split(widths, -1)
            for total, pace, tail, part in zip(totals, self._paces, self._tails, parts, strict=True):
                self._spread(total, pace).copy_(part.unflatten(-1, (pace.length, *tail)))
            return
        places = _columns_of(self, device=received.device)
        for total, part, place, adding in zip(totals, self.unpack(received, wide=True), places, add, strict=True):
            if adding:
                total.index_add_(self._column, place, part.to(total.dtype))
            else:
                total.index_copy_(self._column, place, part)

    def _spread(self, x: Tensor, pace: _Pace) -> Tensor:
        """``[peers, rows, between, columns of the peer, ...]`` of a tensor, without dims of one entry in front."""
        strides, step = x.stride(), x.stride(self._column)
        front = (pace.outer_step * step, pace.inner_step * step, *(strides[dim] for dim in self._order))
        return x.as_strided(
            (*self._front, pace.length, *x.shape[self._column + 1 :]),
            (*(front[place] for place in self._kept), *strides[self._column :]),
            x.storage_offset() + pace.first * step,
        )

    def _picked(self, received: Tensor, wide: bool) -> list[Tensor]:
        (index,) = _received(self, device=received.device)
        units = received.view(-1, self._unit)
        if self._layers == [1]:
            total = received.new_empty(*self._lead, len(self._found[0]), *self._tails[0])
            torch.index_select(units, 0, index, out=total.view(-1, self._unit))
            return [total]
        dtype = torch.promote_types(received.dtype, torch.float32) if wide else received.dtype
        found: list[Tensor] = [received] * len(self._tails)
        groups = [(count, self._width(group), group) for count, group in self._groups()]
        rows = prod(self._lead)
        parts = units.index_select(0, index).view(-1).split([count * rows * width for count, width, _ in groups])
        for (count, width, group), part in zip(groups, parts, strict=True):
            tensors = self._cut(added_up(part.view(count, *self._lead, width), dtype), group)
            for which, tensor in zip(group, tensors, strict=True):
                found[which] = tensor
        return found

    def _groups(self) -> list[tuple[int, list[int]]]:
        """Layers, and the tensors that have as many."""
        by_count = sorted(range(len(self._layers)), key=lambda which: self._layers[which])
        return [(count, list(of)) for count, of in groupby(by_count, key=lambda which: self._layers[which])]

    def _width(self, group: list[int]) -> int:
        return sum(len(self._found[which]) * self._elements[which] for which in group)

    def _cut(self, fused: Tensor, group: Sequence[int]) -> list[Tensor]:
        parts = fused.split([len(self._found[which]) * self._elements[which] for which in group], -1)
        return [
            part.unflatten(-1, (len(self._found[which]), *self._tails[which]))
            for which, part in zip(group, parts, strict=True)
        ]

    def sent(self) -> NDArray[np.integer]:
        """The units of the tensors side by side, in the order of the buffer."""
        rows = np.arange(prod(self._lead)).reshape(self._lead).transpose(self._order).reshape(-1, 1)
        per_column = [elements // self._unit for elements in self._elements]
        bases = [0, *accumulate(held * units for held, units in zip(self._held, per_column, strict=True))]
        blocks = []
        for of_peer in zip(*self._columns, strict=True):
            columns = [
                base + _units(entries(runs), units)
                for base, runs, units in zip(bases, of_peer, per_column, strict=False)
            ]
            blocks.append((rows * bases[-1] + np.concatenate(columns)).reshape(-1))
        return _small(np.concatenate(blocks), prod(self._lead) * bases[-1])

    def received(self) -> NDArray[np.integer]:
        """The units of the buffer, in the order of the tensors: layer by layer of those that have as many."""
        count = prod(self._lead)
        rows = np.argsort(np.arange(count).reshape(self._lead).transpose(self._order).reshape(-1)).reshape(-1, 1)
        widths = np.array(self._widths) // self._unit
        # A last column, which is nobody's, is the unit behind the buffer.
        starts = np.append(count * (np.cumsum(widths) - widths), count * widths.sum())
        steps = np.append(widths, 0)
        within = np.zeros(len(widths), dtype=np.int64)
        found = []
        for of, elements, place in zip(self._columns, self._elements, self._found, strict=True):
            units, given = elements // self._unit, [entries(runs) for runs in of]
            peers = np.repeat(np.arange(len(of)), [len(each) for each in given])
            local = np.concatenate([np.arange(len(each)) for each in given])
            where = [np.searchsorted(place, np.concatenate(given))]
            picked = layers(where, [np.arange(len(peers))], len(place), nothing=len(peers))
            peer = np.append(peers, len(of))[picked]
            first = np.append(starts[peers] + within[peers] + local * units, starts[-1])[picked]
            columns = rows * steps[peer][:, None] + first[:, None]
            found.append(_units_of(columns, units, peer < len(of)))
            within += np.array([len(each) for each in given]) * units
        grouped = [np.concatenate([found[which] for which in group], -1).reshape(-1) for _, group in self._groups()]
        return _small(np.concatenate(grouped), int(starts[-1]) + 1)

    def columns(self) -> tuple[NDArray[np.int64], ...]:
        """By tensor, those that come."""
        return tuple(self._found)


def _units(columns: NDArray[np.int64], units: int) -> NDArray[np.int64]:
    """Of columns that have so many units each."""
    return (columns[:, None] * units + np.arange(units)).reshape(-1)


def _units_of(first: NDArray[np.int64], units: int, there: NDArray[np.bool_]) -> NDArray[np.int64]:
    """``[layers, rows, columns]`` to ``[layers, rows, columns x units]``; what is not there is one unit, repeated."""
    steps = np.arange(units) * there[:, None, :, None]
    found = first[..., None] + steps
    return found.reshape(*first.shape[:2], first.shape[2] * units)


def _small(index: NDArray[np.int64], bound: int) -> NDArray[np.integer]:
    return index.astype(np.int32) if bound < 2**31 else index


def _even(columns: tuple[tuple[Runs, ...], ...]) -> tuple[int, list[_Pace]]:
    """How many peers are in an inner run, and the paces of all tensors; none where they have no even ones."""
    ranks = len(columns[0])
    if all(len(runs) == 1 and runs[0].step == 1 for of in columns for runs in of):
        for inner in range(1, ranks + 1):
            paces = [_pace([runs[0] for runs in of], inner) for of in columns] if ranks % inner == 0 else [None]
            if None not in paces:
                return inner, [pace for pace in paces if pace is not None]
    return 1, []


def _pace(runs: Sequence[range], inner: int) -> _Pace | None:
    first, length = runs[0].start, len(runs[0])
    outer_step = runs[inner].start - first if inner < len(runs) else 0
    inner_step = runs[1].start - first if inner > 1 else 0
    found = _Pace(first, outer_step, inner_step, length)
    fits = min(outer_step, inner_step) >= 0 and all(
        (run.start, len(run)) == (first + index // inner * outer_step + index % inner * inner_step, length)
        for index, run in enumerate(runs)
    )
    return found if fits else None


@kept_on_device
def _sent(side: ByPeer) -> tuple[NDArray[np.integer]]:
    return (side.sent(),)


@kept_on_device
def _received(side: ByPeer) -> tuple[NDArray[np.integer]]:
    return (side.received(),)


@kept_on_device
def _columns_of(side: ByPeer) -> tuple[NDArray[np.int64], ...]:
    return side.columns()
