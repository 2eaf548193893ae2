"""What carries something along a sharded sequence other than softmax attention: states, and short convolutions.

Both go by LASP's exchanges, whatever method serves the softmax layers beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.kernels.softmax import autocast
from dsp_plugin.layout import Layout
from dsp_plugin.methods import METHODS, Where, halo
from dsp_plugin.patches.transformers.inputs import Placement
from dsp_plugin.patches.transformers.rows import Borders

LINEAR = "lasp"


@dataclass
class SequenceMixing:
    """The tokens of one forward pass, for one layer that mixes them.

    Attributes:
        exchange: how states travel.
        documents: the borders that states and convolutions do not cross, of each run of rows that share them: (rows,
            borders). None for one document in every row.
        calls: how often the layer has mixed tokens.
    """

    groups: SequenceParallelGroups
    layout: Layout
    exchange: str
    documents: tuple[tuple[int, Borders], ...] | None
    calls: int = field(default=0, init=False)

    @classmethod
    def of(cls, placement: Placement, groups: SequenceParallelGroups, exchange: str) -> SequenceMixing:
        """For a layer of the pass whose tokens are placed so."""
        rows, by_row = placement.rows, None
        if rows.told and rows.documents_by_row is not None:
            by_row = tuple((len(list(run)), borders) for borders, run in groupby(rows.documents_by_row))
        elif rows.told and rows.documents is not None:
            by_row = ((0, rows.documents),)
        return cls(groups, placement.layout, exchange, by_row)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, *, scale: float | None
    ) -> Tensor:
        """`dsp_plugin.linear_attention` of the whole sequence at this rank's tokens ``[B, n, H, V]``; collective.

        Args:
            q, k, v, g, beta, scale: as it takes them.
        """
        self.calls += 1
        attention = METHODS[LINEAR].attention
        assert attention is not None
        where = Where(self.groups, self.layout)

        def attend(documents: Borders | None, *tensors: Tensor | None) -> Tensor:
            found: Tensor = attention(*tensors, where=where, scale=scale, cu_seqlens=documents, exchange=self.exchange)
            return found

        return self._by_rows(attend, (*(autocast(x) for x in (q, k, v)), g, beta))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`dsp_plugin.short_convolution` of the whole sequence at this rank's tokens ``[B, n, C]``; collective.

        Args:
            x: ``[B, n, C]``.
            weight: ``[C, W]``.
            bias: ``[C]``.
        """
        self.calls += 1

        def convolve(documents: Borders | None, rows: Tensor) -> Tensor:
            return halo.convolve(rows, weight, bias, groups=self.groups, layout=self.layout, cu_seqlens=documents)

        return self._by_rows(convolve, (x,))

    def _by_rows(self, mix: Callable[..., Tensor], tensors: Iterable[Tensor | None]) -> Tensor:
        """``mix(borders, *rows)``, once for each run of rows that share their borders."""
        if self.documents is None or len(self.documents) == 1:
            return mix(None if self.documents is None else self.documents[0][1], *tensors)
        counts = [count for count, _ in self.documents]
        # A decay of each head has no rows.
        parts: list[Any] = [[x] * len(counts) if x is None or x.dim() == 1 else x.split(counts) for x in tensors]
        found = [mix(borders, *rows) for (_, borders), *rows in zip(self.documents, *parts, strict=True)]
        return torch.cat(found)
