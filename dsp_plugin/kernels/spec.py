"""What an attention computes, described once, by who asks for it; `kernels.call` checks it and passes it on whole."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Self

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.kernels.dropout import Dropout
from dsp_plugin.mask import MaskSpec


@dataclass(frozen=True)
class AttentionSpec:
    """Everything about an attention but its tensors and where they lie.

    Args:
        mask: which keys a query sees, in global positions.
        scale: factor on the scores, ``D ** -0.5`` if None.
        dropout_p: probability of dropping an attention probability, in ``[0, 1)``.
        dropout_seed: required with dropout; equal on all ranks of a sequence group, new for each layer and step. What
            is dropped then does not depend on the sharding, see `dsp_plugin.kernels.dropout`.
        kernel: a name in `dsp_plugin.kernels.table.KERNELS`, or ``"auto"`` to choose by device and dtype.
        q_per_kv: how many consecutive query heads each kv head serves; uneven counts are allowed. ``H / K`` if None.
        head_offset: global index of the first query head, when this rank holds a range of the heads.
        batch_offset: global index of the first batch row, when the batch is sharded too.
        cu_seqlens_by_row: document borders of every batch row, in place of ``mask.cu_seqlens``, where rows are packed
            unlike.

    Raises:
        SequenceParallelConfigError: dropout without a seed, or no probability; borders by row and for all rows.
    """

    mask: MaskSpec = field(default_factory=MaskSpec)
    scale: float | None = None
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    kernel: str = "auto"
    q_per_kv: tuple[int, ...] | None = None
    head_offset: int = 0
    batch_offset: int = 0
    cu_seqlens_by_row: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        self._check_rows()
        if not 0.0 <= self.dropout_p < 1.0:
            raise SequenceParallelConfigError(
                setting="dropout_p",
                value=self.dropout_p,
                why="a dropout probability lies in [0, 1)",
                remedy="correct it",
            )
        if self.dropout_p > 0.0 and self.dropout_seed is None:
            raise SequenceParallelConfigError(
                setting="dropout_seed",
                why=f"it is None with dropout_p={self.dropout_p}; ranks could not agree on what to drop",
                remedy="pass an integer, the same on every rank of the sequence group and new for every layer and step",
            )

    def _check_rows(self) -> None:
        if self.cu_seqlens_by_row is None:
            return
        rows = tuple(replace(self.mask, cu_seqlens=borders).cu_seqlens for borders in self.cu_seqlens_by_row)
        object.__setattr__(self, "cu_seqlens_by_row", rows)
        if self.mask.cu_seqlens is not None or None in rows:
            raise SequenceParallelConfigError(
                setting="cu_seqlens_by_row",
                value=rows,
                why=f"the mask has borders for all rows, {self.mask.cu_seqlens}",
                remedy="pass one of them",
            )

    def by_rows(self, batch: int) -> tuple[tuple[int, Self], ...]:
        """The attention of each run of rows that have the same document borders, and how many rows these are.

        Raises:
            SequenceParallelConfigError: there are not as many borders as rows, or they are malformed.
        """
        if self.cu_seqlens_by_row is None:
            return ((batch, self),)
        if len(self.cu_seqlens_by_row) != batch:
            raise SequenceParallelConfigError(
                setting="cu_seqlens_by_row",
                value=self.cu_seqlens_by_row,
                why=f"these are the borders of {len(self.cu_seqlens_by_row)} rows, and the batch has {batch}",
                remedy="pass one (0, end of document 1, ..., sequence length) for each row of the batch",
            )
        found: list[tuple[int, Self]] = []
        first = self.batch_offset
        for borders, run in groupby(self.cu_seqlens_by_row):
            rows, mask = len(list(run)), replace(self.mask, cu_seqlens=borders)
            found.append((rows, replace(self, mask=mask, cu_seqlens_by_row=None, batch_offset=first)))
            first += rows
        return tuple(found) or ((0, replace(self, cu_seqlens_by_row=None)),)

    def narrow(self, heads: range, q_per_kv: tuple[int, ...] | None = None) -> Self:
        """The same attention as a rank sees it that holds some of the heads.

        Args:
            heads: its query heads, counted among these.
            q_per_kv: how many of them each of its kv heads serves.
        """
        return replace(self, head_offset=self.head_offset + heads.start, q_per_kv=q_per_kv)

    def dropout(self, q_positions: range, k_positions: range) -> Dropout | None:
        """The dropout of a block at these global positions; None without dropout."""
        if self.dropout_p == 0.0 or self.dropout_seed is None:
            return None
        return Dropout(self.dropout_p, self.dropout_seed, q_positions, k_positions, self.head_offset, self.batch_offset)
