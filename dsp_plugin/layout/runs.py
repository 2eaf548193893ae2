"""Runs of tokens: of one length cut evenly, and of documents cut in zigzag, as columns of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.int64]


class Runs(NamedTuple):
    """Runs of tokens by their global positions, ``starts + steps * (0, ..., lengths - 1)``.

    Attributes:
        starts: int64 ``[runs]``, as are the others.
        steps: 1 or more.
        lengths: 1 or more.
    """

    starts: Column
    steps: Column
    lengths: Column

    @classmethod
    def of(cls, starts: Column, stops: Column) -> Runs:
        """Runs without gaps from ``starts`` to ``stops``, empty ones left out."""
        filled = stops > starts
        starts, stops = starts[filled], stops[filled]
        return cls(starts, np.ones_like(starts), stops - starts)

    def ranges(self) -> tuple[range, ...]:
        """The same as ranges."""
        stops = self.starts + self.steps * self.lengths
        return tuple(map(range, self.starts.tolist(), stops.tolist(), self.steps.tolist()))

    def positions(self) -> Column:
        """Of every token, in the order of the runs: ``[n]``."""
        ends = np.cumsum(self.lengths)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - self.lengths, self.lengths)
        return np.repeat(self.starts, self.lengths) + np.repeat(self.steps, self.lengths) * within


def shard_sizes(length: int, parts: int) -> tuple[int, ...]:
    """``length`` split into ``parts`` sizes that differ by at most one, larger ones first."""
    whole, extra = divmod(length, parts)
    return tuple(whole + (part < extra) for part in range(parts))


def shard_ranges(length: int, parts: int) -> tuple[range, ...]:
    """The ranges that `shard_sizes` cuts ``range(length)`` into."""
    return consecutive(shard_sizes(length, parts))


def consecutive(sizes: Sequence[int]) -> tuple[range, ...]:
    """Ranges of the given sizes, one after the other from 0."""
    return tuple(range(stop - size, stop) for size, stop in zip(sizes, accumulate(sizes), strict=True))


def zigzag_borders(starts: Column, lengths: Column, size: int) -> Column:
    """Where the 2P runs of each document start and end: int64 ``[documents, 2P + 1]``.

    Rank r is to hold runs r and 2P-1-r. The first of the longer runs of a document is where the document before left
    off dealing, so that tokens in all differ by at most one between ranks.
    """
    parts = 2 * size
    whole, extra = np.divmod(lengths, parts)
    longer = (np.cumsum(extra) - extra) % parts
    borders = np.empty((len(starts), parts + 1), dtype=np.int64)
    borders[:, 0] = starts
    borders[:, 1:] = whole[:, None] + ((np.arange(parts) - longer[:, None]) % parts < extra[:, None])
    return np.cumsum(borders, axis=1, out=borders)


def folded(by_run: Column) -> Column:
    """Of a number for each of 2P runs ``[..., 2P]``, the sums of every rank's two: ``[..., P]``."""
    size = by_run.shape[-1] // 2
    return by_run[..., :size] + by_run[..., : size - 1 : -1]
