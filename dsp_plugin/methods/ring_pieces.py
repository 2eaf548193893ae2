"""Pieces, the runs of ranks' tokens cut at document borders, as columns of numbers, and who reads which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dsp_plugin.layout import Runs
from dsp_plugin.mask import MaskSpec

Column = NDArray[np.int64]
FAR = 2**60
"""More than any distance between tokens: the bound of a band that has none."""


@dataclass(frozen=True, eq=False)
class Pieces:
    """Of one rank or several, in the order of ranks and of their local tokens, which ascends.

    Attributes:
        rank: whose tokens they are; int64 ``[pieces]``, as are the others.
        start, step: global positions ``start + step * (0, ..., length - 1)``.
        length: how many tokens.
        offset: where they lie in the tensors of their rank.
        document: in which they lie.
    """

    rank: Column
    start: Column
    step: Column
    length: Column
    offset: Column
    document: Column

    @classmethod
    def of(cls, runs_by_rank: Sequence[Runs], borders: Column | None) -> Pieces:
        """Of the runs of every rank, cut at the borders of documents, of which none is empty."""
        start, step, length = (np.concatenate(columns) for columns in zip(*runs_by_rank, strict=True))
        rank = np.repeat(np.arange(len(runs_by_rank)), [len(runs.starts) for runs in runs_by_rank])
        document = np.zeros_like(start)
        if borders is not None:
            document = np.searchsorted(borders, start, side="right") - 1
            if (start + step * (length - 1) >= borders[document + 1]).any():
                rank, start, step, length, document = _cut(rank, start, step, length, document, borders)
        ends = np.cumsum(length)
        tokens = np.bincount(rank, weights=length, minlength=len(runs_by_rank)).astype(np.int64)
        offset = ends - length - (np.cumsum(tokens) - tokens)[rank]
        return cls(rank, start, step, length, offset, document)

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, chosen: slice | NDArray[np.bool_] | Column) -> Pieces:
        columns = self.rank, self.start, self.step, self.length, self.offset, self.document
        return Pieces(*(column[chosen] for column in columns))

    @cached_property
    def last(self) -> Column:
        """The last global position of each."""
        return self.start + self.step * (self.length - 1)

    @cached_property
    def units(self) -> tuple[Column, Column, Column]:
        """Of one rank's: the documents that it has tokens of, and the first and the last of its pieces of each."""
        new = np.flatnonzero(np.diff(self.document)) + 1
        first = np.concatenate([[0], new]) if len(self) else new
        last = np.concatenate([new, [len(self)]])[: len(first)] - 1
        return self.document[first], first, last

    def positions(self, index: int) -> range:
        """Its global positions."""
        start, step = int(self.start[index]), int(self.step[index])
        return range(start, start + step * int(self.length[index]), step)


def _cut(
    rank: Column, start: Column, step: Column, length: Column, first: Column, borders: Column
) -> tuple[Column, ...]:
    """Runs that begin in document ``first``, cut at borders."""
    last = np.searchsorted(borders, start + step * (length - 1), side="right") - 1
    counts = last - first + 1
    run = np.repeat(np.arange(len(start)), counts)
    document = first[run] + _counted(counts)
    begin = np.maximum(-((start[run] - borders[document]) // step[run]), 0)
    end = np.minimum(-((start[run] - borders[document + 1]) // step[run]), length[run])
    run, document, begin, end = (column[end > begin] for column in (run, document, begin, end))
    return rank[run], start[run] + step[run] * begin, step[run], end - begin, document


def _counted(counts: Column) -> Column:
    """0, 1, ... up to each of the counts, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Queries and keys that lie in one document and see each other, in part at least.

    Attributes:
        q, k: which of the pieces of queries, and of those of keys; ordered by queries, then keys.
        left, right: key j of the piece is seen by query i iff ``-left <= j - i <= right``; `FAR` is unbounded.
    """

    q: Column
    k: Column
    left: Column
    right: Column

    @classmethod
    def of(cls, queries: Pieces, keys: Pieces, mask: MaskSpec) -> Pairs:
        """All that there are."""
        order = np.argsort(keys.document, kind="stable")
        documents = keys.document[order]
        first, stop = (np.searchsorted(documents, queries.document, side=side) for side in ("left", "right"))
        q = np.repeat(np.arange(len(queries)), stop - first)
        k = order[first[q] + _counted(stop - first)]
        step = np.where(queries.length[q] > 1, queries.step[q], keys.step[k])
        offset = keys.start[k] - queries.start[q]
        reach_left, reach_right = mask.band()
        left, right = np.full_like(offset, FAR), np.full_like(offset, FAR)
        if reach_left is not None:
            left = (reach_left + offset) // step
        if reach_right is not None:
            right = (reach_right - offset) // step
        # Which of the distances that occur the band allows.
        seen = np.maximum(1 - queries.length[q], -left) <= np.minimum(keys.length[k] - 1, right)
        return cls(q[seen], k[seen], left[seen], right[seen])


@dataclass(frozen=True, eq=False)
class Sight:
    """A mask as documents have it.

    Attributes:
        mask: in global positions.
        borders: of documents, empty ones left out; None if the sequence is one.
        length: of the longest document, or a number that is no less.
    """

    mask: MaskSpec
    borders: Column | None

    @classmethod
    def of(cls, mask: MaskSpec) -> Sight:
        """Of a mask."""
        borders = None if mask.cu_seqlens is None else np.unique(np.array(mask.cu_seqlens, dtype=np.int64))
        return cls(mask, borders)

    @cached_property
    def documents(self) -> int:
        """How many there are."""
        return 1 if self.borders is None else len(self.borders) - 1

    @cached_property
    def back(self) -> NDArray[np.bool_]:
        """Of every document, whether queries see as far back as it goes."""
        return self._reaches(self.mask.band()[0])

    @cached_property
    def simple(self) -> NDArray[np.bool_]:
        """Of every document, whether the mask is causal in it, or none."""
        right = self.mask.band()[1]
        return self.back & (self._reaches(right) | (right == 0))

    def _reaches(self, side: int | None) -> NDArray[np.bool_]:
        if side is None:
            return np.ones(self.documents, dtype=bool)
        if self.borders is None:
            return np.zeros(1, dtype=bool)
        return np.diff(self.borders) <= side + 1

    def readers(self, pieces: Pieces, size: int) -> NDArray[np.bool_]:
        """``[size, pieces]``: whether a rank sees a piece, in part at least."""
        right = self.mask.band()[1]
        last = np.full((size, self.documents), -FAR, dtype=np.int64)
        np.maximum.at(last, (pieces.rank, pieces.document), pieces.last)
        # Where nothing bounds the view back, whoever has a query that is late enough sees the first key of a piece.
        late_enough = -FAR + 1 if right is None else pieces.start - right
        found: NDArray[np.bool_] = last.take(pieces.document, axis=1) >= late_enough
        bounded = np.flatnonzero(~self.back[pieces.document])
        if len(bounded):
            some = pieces[bounded]
            pairs = Pairs.of(some, some, self.mask)
            found[:, bounded] = False
            found[some.rank[pairs.q], bounded[pairs.k]] = True
        return found
