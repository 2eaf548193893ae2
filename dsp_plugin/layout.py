"""Which rank holds which tokens, and in what order: contiguous, zigzag and striped, for any length and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.integers import MOST, integer, integers

LayoutKind = Literal["contiguous", "zigzag", "striped"]
LAYOUTS: tuple[LayoutKind, ...] = get_args(LayoutKind)
MOST_RANKS = 2**20
"""More than any machine has: a larger count is a mistake, and what lists the ranks would never end."""


def shard_sizes(length: int, parts: int) -> tuple[int, ...]:
    """``length`` split into ``parts`` sizes that differ by at most one, larger ones first."""
    whole, extra = divmod(length, parts)
    return tuple(whole + (part < extra) for part in range(parts))


def shard_ranges(length: int, parts: int) -> tuple[range, ...]:
    """The ranges that `shard_sizes` cuts ``range(length)`` into."""
    return _consecutive(shard_sizes(length, parts))


def _consecutive(sizes: Sequence[int]) -> tuple[range, ...]:
    return tuple(range(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes), strict=True))


def _zigzag(borders: Sequence[int], size: int) -> list[tuple[range, ...]]:
    """Runs r and 2P-1-r of every document, by rank r."""
    runs_by_rank: list[list[range]] = [[] for _ in range(size)]
    longer = 0
    for start, stop in pairwise(borders):
        whole, extra = divmod(stop - start, 2 * size)
        at = start
        for index in range(2 * size):
            # The first of the longer runs is where the document before left off dealing.
            end = at + whole + ((index - longer) % (2 * size) < extra)
            runs_by_rank[min(index, 2 * size - 1 - index)].append(range(at, end))
            at = end
        longer = (longer + extra) % (2 * size)
    return [tuple(runs) for runs in runs_by_rank]


@dataclass(frozen=True)
class Layout:
    """The placement of one sequence of ``length`` tokens on ``size`` ranks.

    * ``contiguous``: rank r holds the r-th of P runs.
    * ``zigzag``: of 2P runs rank r holds runs r and 2P-1-r, which balances causal work; Megatron-core's order.
    * ``striped``: rank r holds tokens r, r+P, r+2P, ...

    Lengths need not divide; runs differ by at most one token. ``explicit_sizes`` overrides the sizes of contiguous runs
    (tokens that are the product of a sharded dim and a whole one come in such sizes).

    ``documents``, borders ``(0, ..., length)`` as in `MaskSpec.cu_seqlens`, makes zigzag cut every document by itself:
    rank r holds runs r and 2P-1-r of each, so causal work is balanced whatever the lengths. Which runs are a token
    longer rotates from document to document, so that tokens in all still differ by at most one between ranks; the
    pairs of a causal document of l tokens differ by less than 2l. With one document it is plain zigzag.

    Raises:
        SequenceParallelConfigError: unknown kind, a count that is no integer, a size below 1 or beyond
            `MOST_RANKS`, or sizes or documents that do not add up.
    """

    kind: LayoutKind
    length: int
    size: int
    explicit_sizes: tuple[int, ...] | None = None
    documents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in LAYOUTS:
            raise SequenceParallelConfigError(
                setting="layout", value=self.kind, why=f"known layouts are {', '.join(LAYOUTS)}", remedy="pick one"
            )
        for name in ("length", "size"):
            count = integer(getattr(self, name), f"layout {name}", least=-MOST, remedy="check how it was read")
            object.__setattr__(self, name, count)
        if not 1 <= self.size <= MOST_RANKS or self.length < 0:
            raise SequenceParallelConfigError(
                setting="layout",
                value=f"{self.kind}(length={self.length}, size={self.size})",
                why=f"a layout needs length >= 0 and size >= 1, and no more than {MOST_RANKS:,} ranks",
                remedy="check how the sequence length was read",
            )
        if self.explicit_sizes is not None:
            given = integers(self.explicit_sizes, "layout explicit_sizes", remedy="count the tokens of each rank")
            object.__setattr__(self, "explicit_sizes", given)
        sizes = self.explicit_sizes
        if sizes is not None and (self.kind != "contiguous" or len(sizes) != self.size or sum(sizes) != self.length):
            raise SequenceParallelConfigError(
                setting="layout",
                value=f"{self.kind}(length={self.length}, size={self.size}, explicit_sizes={sizes})",
                why=f"explicit sizes are those of {self.size} contiguous runs of {self.length} tokens in all; these "
                f"are {len(sizes)} with {sum(sizes)} tokens",
                remedy="use Layout.of_sizes",
            )
        self._check_documents()

    def _check_documents(self) -> None:
        if self.documents is None:
            return
        borders = integers(self.documents, "documents", remedy="pass (0, end of document 1, ..., sequence length)")
        object.__setattr__(self, "documents", borders)
        if self.kind != "zigzag":
            raise SequenceParallelConfigError(
                setting="documents",
                value=borders,
                why=f"only zigzag cuts every document by itself, and the layout is {self.kind}",
                remedy="choose layout zigzag, or leave documents to the mask",
            )
        if borders[:1] != (0,) or borders[-1] != self.length or any(b < a for a, b in pairwise(borders)):
            raise SequenceParallelConfigError(
                setting="documents",
                value=borders,
                why=f"document borders start at 0, never decrease, and end at the sequence length, {self.length}",
                remedy="pass (0, end of document 1, ..., sequence length)",
            )

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> Layout:
        """Contiguous runs of the given sizes."""
        return cls("contiguous", sum(sizes), len(sizes), tuple(sizes))

    def spans(self, rank: int) -> tuple[range, ...]:
        """Global positions of the tokens of ``rank``, in local order; empty runs left out."""
        return self._spans[rank]

    @cached_property
    def _spans(self) -> tuple[tuple[range, ...], ...]:
        runs_by_rank: list[tuple[range, ...]]
        if self.kind == "striped":
            runs_by_rank = [(range(rank, self.length, self.size),) for rank in range(self.size)]
        elif self.kind == "zigzag":
            runs_by_rank = _zigzag((0, self.length) if self.documents is None else self.documents, self.size)
        elif self.explicit_sizes is not None:
            runs_by_rank = [(run,) for run in _consecutive(self.explicit_sizes)]
        else:
            runs_by_rank = [(run,) for run in shard_ranges(self.length, self.size)]
        return tuple(tuple(run for run in runs if len(run)) for runs in runs_by_rank)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Local token counts by rank; they sum to ``length``."""
        return tuple(sum(len(run) for run in self._spans[rank]) for rank in range(self.size))

    def position_ids(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Global positions of the tokens of ``rank``: int64 ``[n]``."""
        runs = [torch.arange(run.start, run.stop, run.step, device=device) for run in self.spans(rank)]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device=device)

    def shard(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """The part of ``x`` (global along ``dim``) that ``rank`` holds; a view when it is one run.

        Raises:
            SequenceParallelConfigError: ``x`` does not have ``length`` entries along ``dim``.
        """
        if x.shape[dim] != self.length:
            raise SequenceParallelConfigError(
                setting="sequence length",
                value=x.shape[dim],
                why=f"dim {dim} of a tensor {tuple(x.shape)} should hold the whole sequence of {self.length} tokens",
                remedy="pass unsharded tensors, and name the sequence dim correctly",
            )
        runs = [run_of(x, dim, run) for run in self.spans(rank)]
        if not runs:
            return x.narrow(dim, 0, 0)
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim)

    def unshard(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """The global tensor from the shards of all ranks, in rank order."""
        shape = list(shards[0].shape)
        shape[dim] = self.length
        out = shards[0].new_empty(shape)
        for rank, shard in enumerate(shards):
            offset = 0
            for run in self.spans(rank):
                run_of(out, dim, run).copy_(shard.narrow(dim, offset, len(run)))
                offset += len(run)
        return out


def run_of(x: Tensor, dim: int, run: range) -> Tensor:
    """The entries of ``x`` at the positions ``run`` along ``dim``, as a view."""
    index: list[slice] = [slice(None)] * x.dim()
    index[dim] = slice(run.start, run.stop, run.step)
    return x[tuple(index)]
