"""Who needs which keys in ring attention, and whom each gets them from: pure arithmetic on positions.

Keys and values move in *pieces*, the runs of a rank's tokens cut at document borders. After hop t a rank holds, of the
keys of the rank t places behind it on the ring, the pieces that it sees, and no others. Each piece comes from the rank
before if that one has just read it too, otherwise straight from home: what nobody reads is never sent, and what leaves
all ranks together is every piece once per reader, the least there can be. Gradients of a piece take the same ways
back to front: on with their keys while the next rank reads them too, otherwise straight home.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsp_plugin.mask import MaskSpec

Runs = tuple[range, ...]
Slices = tuple[slice, ...]


class Work(NamedTuple):
    """A run of this rank's queries and a piece of the keys it holds that see each other, in part at least.

    Attributes:
        q: the queries, in this rank's tensors.
        k: the keys, in the tensors held.
        q_positions, k_positions: their global positions, which lie in one document.
    """

    q: slice
    k: slice
    q_positions: range
    k_positions: range


@dataclass(frozen=True)
class Hop:
    """What a rank holds after ``distance`` hops, and what moves then. Tokens are named by where they lie in a tensor.

    Attributes:
        source: whose keys are held.
        tokens: how many are held; at home, all.
        work: what to compute with them.
        on: held, and read by the next rank too; for ``distance`` > 0 their gradients go there with them.
        done: held, and not read by the next rank: their gradients go home now. Empty at home.
        reader: the rank ``distance`` + 1 places ahead.
        jumps: this rank's own tokens that ``reader`` reads, though the one before it does not.
        passed: of what will be held after the next hop, what the rank before passes on.
        jumped: of what will be held after the next hop, what its owner sends.
        visitor: the rank that holds this rank's keys now.
        returned: this rank's own tokens whose gradients ``visitor`` sends home now. Empty at home.
    """

    distance: int
    source: int
    tokens: int
    work: tuple[Work, ...]
    on: Slices
    done: Slices
    reader: int
    jumps: Slices
    passed: Slices
    jumped: Slices
    visitor: int
    returned: Slices


class RingSchedule:
    """The way of every piece for one placement and mask.

    Args:
        runs: global positions of the tokens of every rank, in local order.
        mask: in global positions.
        shift: 1 sends the ring upwards and -1 downwards. Both ways cost the same bytes; the default is the way on which
            more of them go to the neighbour, downwards where that is the same.
    """

    def __init__(self, runs: Sequence[Runs], mask: MaskSpec, shift: int | None = None) -> None:
        self.size = len(runs)
        self._pieces = _Pieces.of(runs, mask)
        self._queries, self._keys = _visible(self._pieces, mask)
        if shift is None:
            shift = min((-1, 1), key=self._tokens_that_jump)
        self.shift = shift
        self._hops: dict[int, tuple[Hop, ...]] = {}

    def hops(self, rank: int) -> tuple[Hop, ...]:
        """What happens on ``rank``: at home, and after each of R-1 hops."""
        if rank not in self._hops:
            self._hops[rank] = tuple(self._hop(rank, distance) for distance in range(self.size))
        return self._hops[rank]

    def next(self, rank: int) -> int:
        """The rank that ``rank`` sends to."""
        return (rank + self.shift) % self.size

    def before(self, rank: int) -> int:
        """The rank that ``rank`` receives from."""
        return (rank - self.shift) % self.size

    def source(self, rank: int, distance: int) -> int:
        """The rank whose keys are at ``rank`` after ``distance`` hops."""
        return (rank - self.shift * distance) % self.size

    def readers(self, rank: int) -> list[tuple[range, int, frozenset[int]]]:
        """Positions, document and readers, itself included if it is one, of every piece of ``rank``."""
        mine = self._pieces.of_rank(rank)
        return [
            (
                self._pieces.positions(piece),
                int(self._pieces.document[piece]),
                frozenset(np.flatnonzero(self._read_by[piece]).tolist()),
            )
            for piece in range(mine.start, mine.stop)
        ]

    def key_tokens_sent(self, rank: int) -> int:
        """Tokens whose keys and values leave ``rank`` in one pass."""
        here = self._reads(self.shift)
        total = 0
        for distance in range(1, self.size):
            passed_on = self._pieces.of_rank(self.source(rank, distance - 1))
            total += self._tokens(passed_on, here[passed_on, distance - 1] & here[passed_on, distance])
            own = self._pieces.of_rank(rank)
            total += self._tokens(own, here[own, distance] & ~here[own, distance - 1])
        return total

    def gradient_tokens_sent(self, rank: int) -> int:
        """Tokens whose key and value gradients leave ``rank``: those that it reads and does not own."""
        here = self._reads(self.shift)
        total = 0
        for distance in range(1, self.size):
            source = self._pieces.of_rank(self.source(rank, distance))
            total += self._tokens(source, here[source, distance])
        return total

    @cached_property
    def _read_by(self) -> NDArray[np.bool_]:
        """``[pieces, ranks]``: whether a rank sees a piece."""
        found = np.zeros((len(self._pieces), self.size), dtype=bool)
        found[self._keys, self._pieces.rank[self._queries]] = True
        return found

    def _reads(self, shift: int) -> NDArray[np.bool_]:
        """``[pieces, distances]``: whether the rank at a distance reads a piece. Home does: tokens see themselves."""
        ranks = (self._pieces.rank[:, None] + shift * np.arange(self.size)[None, :]) % self.size
        return np.take_along_axis(self._read_by, ranks, axis=1)

    def _tokens_that_jump(self, shift: int) -> int:
        reads = self._reads(shift)
        return int(((reads[:, 1:] & ~reads[:, :-1]).sum(1) * self._pieces.length).sum())

    def _tokens(self, pieces: slice, chosen: NDArray[np.bool_]) -> int:
        return int(self._pieces.length[pieces][chosen].sum())

    def _hop(self, rank: int, distance: int) -> Hop:
        pieces, reads = self._pieces, self._reads(self.shift)
        last = distance + 1 == self.size
        source = self.source(rank, distance)
        own, held = pieces.of_rank(rank), pieces.of_rank(source)
        holds = reads[held, distance]
        nothing = np.zeros(holds.shape, dtype=bool)
        goes_on = nothing if last else holds & reads[held, distance + 1]
        lengths = pieces.length[held]
        jumps: Slices = ()
        passed: Slices = ()
        jumped: Slices = ()
        returned: Slices = ()
        if not last:
            jumps = _slices(pieces.length[own], True, reads[own, distance + 1] & ~reads[own, distance])
            upcoming = pieces.of_rank(self.source(rank, distance + 1))
            will, had = reads[upcoming, distance + 1], reads[upcoming, distance]
            passed = _slices(pieces.length[upcoming], will, had)
            jumped = _slices(pieces.length[upcoming], will, ~had)
        if distance:
            home = reads[own, distance] & ~(reads[own, distance + 1] if not last else np.False_)
            returned = _slices(pieces.length[own], True, home)
        return Hop(
            distance=distance,
            source=source,
            tokens=int(lengths[holds].sum()),
            work=self._work(rank, held, holds),
            on=_slices(lengths, holds, goes_on),
            done=_slices(lengths, holds, ~goes_on) if distance else (),
            reader=(rank + self.shift * (distance + 1)) % self.size,
            jumps=jumps,
            passed=passed,
            jumped=jumped,
            visitor=(rank + self.shift * distance) % self.size,
            returned=returned,
        )

    def _work(self, rank: int, held: slice, holds: NDArray[np.bool_]) -> tuple[Work, ...]:
        pieces = self._pieces
        mine = pieces.of_rank(rank)
        chosen = (self._queries >= mine.start) & (self._queries < mine.stop)
        chosen &= (self._keys >= held.start) & (self._keys < held.stop)
        ends = np.cumsum(np.where(holds, pieces.length[held], 0))
        queries = {index: pieces.run(index) for index in np.unique(self._queries[chosen]).tolist()}
        keys = {
            index: (pieces.positions(index), slice(int(end) - int(pieces.length[index]), int(end)))
            for index in np.unique(self._keys[chosen]).tolist()
            for end in [ends[index - held.start]]
        }
        found = []
        for q, k in zip(self._queries[chosen].tolist(), self._keys[chosen].tolist(), strict=True):
            (q_positions, q_slice), (k_positions, k_slice) = queries[q], keys[k]
            found.append(Work(q_slice, k_slice, q_positions, k_positions))
        return tuple(found)


@dataclass(frozen=True)
class _Pieces:
    """All ranks' pieces as columns, in the order of ranks and of their local tokens."""

    rank: NDArray[np.int64]
    start: NDArray[np.int64]
    step: NDArray[np.int64]
    length: NDArray[np.int64]
    offset: NDArray[np.int64]
    document: NDArray[np.int64]
    borders: tuple[int, ...]

    @classmethod
    def of(cls, runs_by_rank: Sequence[Runs], mask: MaskSpec) -> _Pieces:
        rows: list[tuple[int, int, int, int, int, int]] = []
        borders = [0]
        for rank, runs in enumerate(runs_by_rank):
            offset = 0
            for run in runs:
                for document, piece in _cut(run, mask.cu_seqlens):
                    rows.append((rank, piece.start, piece.step, len(piece), offset, document))
                    offset += len(piece)
            borders.append(len(rows))
        rank_, start, step, length, offset_, document_ = np.array(rows, dtype=np.int64).reshape(-1, 6).T
        return cls(rank_, start, step, length, offset_, document_, tuple(borders))

    def __len__(self) -> int:
        return len(self.rank)

    def of_rank(self, rank: int) -> slice:
        return slice(self.borders[rank], self.borders[rank + 1])

    def positions(self, index: int) -> range:
        start, step = int(self.start[index]), int(self.step[index])
        return range(start, start + step * int(self.length[index]), step)

    def run(self, index: int) -> tuple[range, slice]:
        """Its positions, and where it lies in its owner's tensors."""
        offset = int(self.offset[index])
        return self.positions(index), slice(offset, offset + int(self.length[index]))


def _cut(run: range, borders: tuple[int, ...] | None) -> list[tuple[int, range]]:
    """The non-empty parts of a run by document."""
    if not len(run):
        return []
    if borders is None:
        return [(0, run)]
    found = []
    index = 0
    while index < len(run):
        document = bisect_right(borders, run[index]) - 1
        end = min(-((run.start - borders[document + 1]) // run.step), len(run))
        found.append((document, run[index:end]))
        index = end
    return found


def _visible(pieces: _Pieces, mask: MaskSpec) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the pairs of pieces whose queries and keys see each other, ordered by keys, then queries."""
    by_document = np.argsort(pieces.document, kind="stable")
    counts = np.bincount(pieces.document) if len(pieces) else np.zeros(0, dtype=np.int64)
    mates = np.repeat(counts, counts)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    k = np.repeat(np.arange(len(pieces)), mates)
    q = np.arange(len(k)) - np.repeat(np.cumsum(mates) - mates, mates) + np.repeat(firsts, mates)
    q, k = by_document[q], by_document[k]
    step = np.where(pieces.length[q] > 1, pieces.step[q], pieces.step[k])
    offset = pieces.start[k] - pieces.start[q]
    # Keys and queries of a pair are offset + step * i apart; which i occur, and which the band allows:
    low, high = 1 - pieces.length[q], pieces.length[k] - 1
    left, right = mask.band()
    if left is not None:
        low = np.maximum(low, -((left + offset) // step))
    if right is not None:
        high = np.minimum(high, (right - offset) // step)
    seen = low <= high
    q, k = q[seen], k[seen]
    order = np.lexsort((q, k))
    return q[order], k[order]


def _slices(lengths: NDArray[np.int64], there: NDArray[np.bool_] | bool, chosen: NDArray[np.bool_]) -> Slices:
    """Where the chosen pieces lie in a tensor of those that are ``there``, neighbours joined."""
    present = np.where(there, lengths, 0)
    ends = np.cumsum(present)
    pick = chosen & (present > 0)
    starts, stops = (ends - present)[pick].tolist(), ends[pick].tolist()
    joined: list[slice] = []
    for start, stop in zip(starts, stops, strict=True):
        if joined and joined[-1].stop == start:
            joined[-1] = slice(joined[-1].start, stop)
        else:
            joined.append(slice(start, stop))
    return tuple(joined)
