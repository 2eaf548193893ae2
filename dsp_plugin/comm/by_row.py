"""Buffers of all rows of some columns: what arrives is read as it lies, or its rows are put in order by one launch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsp_plugin.comm.routes import Runs, consecutive, entries, length_of
from dsp_plugin.comm.strides import added_up, layers, side_by_side
from dsp_plugin.integers import kept_on_device


class ByRow:
    """Tensors ``[..., rows, ..., columns, ...]`` and a buffer ``[rows, between, columns of all]``, peer after peer.

    Args:
        row: the dim of the rows.
        lead: sizes of the dims in front of the columns; what it has for the rows does not matter.
        tails: of every tensor, those behind them.
        columns: of every tensor, how many.
        rows: by peer, where its rows stand in the tensors. A row of several peers is theirs all; what comes of it from
            them is added up.

    Attributes:
        counts: elements of the buffer by peer.
        behind: elements of value 0 that `unpack` needs behind the buffer.
    """

    def __init__(
        self,
        row: int,
        lead: tuple[int, ...],
        tails: tuple[tuple[int, ...], ...],
        columns: tuple[int, ...],
        rows: tuple[Runs, ...],
    ) -> None:
        others = [dim for dim in range(len(lead)) if dim != row]
        self._row, self._columns, self._rows = row, len(lead), rows
        self._order = (row, *others)
        self._back = tuple(int(dim) for dim in np.argsort(self._order))
        self._between = tuple(lead[dim] for dim in others)
        self._widths = [count * prod(tail) for count, tail in zip(columns, tails, strict=True)]
        self._shapes = [(count, *tail) for count, tail in zip(columns, tails, strict=True)]
        self._sizes = [sum(map(len, runs)) for runs in rows]
        self._length = length_of(rows)
        self._in_order = consecutive(rows)
        self._width = prod(self._between) * sum(self._widths)
        self.counts = [size * self._width for size in self._sizes]
        self._layers = 1 if self._in_order else len(self._places())
        self._lacking = self._layers * self._length > sum(self._sizes)
        self.behind = self._width if self._lacking else 0

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """The buffer; a view of the only tensor where that lies as the buffer does."""
        views = [self._rows_first(x) for x in tensors]
        if self._in_order:
            return side_by_side(views, self._columns).view(-1)
        (order,) = _order_of(self, device=tensors[0].device)
        if len(views) == 1:
            return views[0].index_select(0, order).view(-1)
        packed = side_by_side(views, self._columns)
        return packed.view(len(packed), self._width).index_select(0, order).view(-1)

    def unpack(self, received: Tensor) -> list[Tensor]:
        """The tensors, as views of what was received or of one buffer of their own."""
        if not self._in_order:
            (places,) = _places_of(self, device=received.device)
            held = sum(self._sizes) + self._lacking
            rows = received.view(held, self._width).index_select(0, places)
            received = added_up(rows.view(self._layers, self._length * self._width), received.dtype)
        tensors = received.view(self._length, *self._between, sum(self._widths)).split(self._widths, -1)
        return [self._rows_back(x, shape) for x, shape in zip(tensors, self._shapes, strict=True)]

    def order(self) -> NDArray[np.int64]:
        """The row of the tensors that each row of the buffer is."""
        return entries(tuple(run for runs in self._rows for run in runs))

    def places(self) -> NDArray[np.int64]:
        """Of each row of the tensors, the rows of the buffer that are added up, layer by layer."""
        return self._places().reshape(-1)

    def _places(self) -> NDArray[np.int64]:
        order = self.order()
        return layers([order], [np.arange(len(order))], self._length, nothing=len(order))

    def _rows_first(self, x: Tensor) -> Tensor:
        return x.permute(*self._order, *range(self._columns, x.dim()))

    def _rows_back(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x.unflatten(-1, shape).permute(*self._back, *range(self._columns, self._columns + len(shape)))


@kept_on_device
def _order_of(side: ByRow) -> tuple[NDArray[np.int64]]:
    return (side.order(),)


@kept_on_device
def _places_of(side: ByRow) -> tuple[NDArray[np.int64]]:
    return (side.places(),)
