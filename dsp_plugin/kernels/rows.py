"""Attention of a batch whose rows are packed unlike: one attention for each run of rows that share their borders."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from dsp_plugin.kernels.spec import AttentionSpec

Attend = Callable[[Tensor, Tensor, Tensor, AttentionSpec], tuple[Tensor, ...]]


def row_by_row(attend: Attend, tensors: Iterable[Tensor], spec: AttentionSpec, length: int) -> tuple[Tensor, ...]:
    """What ``attend`` returns for the whole batch, called once where all rows share their borders.

    What is sent and computed is in all that of the rows; it comes in as many turns as there are runs of rows.

    Args:
        attend: of some of the rows, with a spec that has one mask for all of them.
        tensors: q, k and v, ``[B, ...]``.
        length: of the whole sequence, with which every row's borders end.

    Raises:
        SequenceParallelConfigError: the borders do not fit the batch or the sequence; before anything is sent.
    """
    q, k, v = tensors
    parts = spec.by_rows(q.shape[0])
    for _, part in parts:
        part.mask.documents(length)
    if len(parts) == 1:
        return attend(q, k, v, parts[0][1])
    # A slice of each would get a gradient as large as the batch.
    counts = [count for count, _ in parts]
    rows = zip(*(x.split(counts) for x in (q, k, v)), strict=True)
    found = [attend(q, k, v, part) for (q, k, v), (_, part) in zip(rows, parts, strict=True)]
    return tuple(torch.cat(outputs) for outputs in zip(*found, strict=True))
