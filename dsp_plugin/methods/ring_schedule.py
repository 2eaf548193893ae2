"""Who needs which keys in ring attention, and whom each gets them from: pure arithmetic on positions.

Keys and values move in *pieces*, the runs of a rank's tokens cut at document borders. After hop t a rank holds, of the
keys of the rank t places behind it on the ring, the pieces that it sees, and no others. Each piece comes from the rank
before if that one has just read it too, otherwise straight from home: what nobody reads is never sent, and what leaves
all ranks together is every piece once per reader, the least there can be. Gradients of a piece take the same ways
back to front: on with their keys while the next rank reads them too, otherwise straight home.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsp_plugin.layout import Runs
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods.places import Places
from dsp_plugin.methods.ring_calls import Call, blocks_of, calls_of
from dsp_plugin.methods.ring_pieces import Pairs, Pieces, Sight


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


class Hop:
    """What a rank holds after ``distance`` hops, and what moves then, worked out when it is first asked for.

    Attributes:
        source: whose keys are held.
        reader: the rank ``distance`` + 1 places ahead.
        visitor: the rank that holds this rank's keys now.
    """

    def __init__(self, schedule: RingSchedule, rank: int, distance: int) -> None:
        self._schedule, self.rank, self.distance = schedule, rank, distance
        self.source, self.visitor = schedule.source(rank, distance), schedule.source(rank, -distance)
        self.reader = schedule.source(rank, -distance - 1)
        self._last = distance + 1 == schedule.size

    @cached_property
    def tokens(self) -> int:
        """How many tokens are held; at home, all."""
        return int(self._lengths.sum())

    @cached_property
    def work(self) -> tuple[Work, ...]:
        """What to compute with them, run by run."""
        return self._schedule.work(self)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The same in few calls."""
        return self._schedule.calls(self.rank)[self.distance]

    @cached_property
    def calls_by_run(self) -> tuple[Call, ...]:
        """The same in a call for each of `work`, for results that depend on global positions, as those of dropout."""
        return tuple(
            Call(Places.stretch_of(work.q), Places.stretch_of(work.k), (work.q_positions, work.k_positions))
            for work in self.work
        )

    @cached_property
    def on(self) -> Places:
        """Held, and read by the next rank too; for ``distance`` > 0 their gradients go there with them."""
        return self._held(self._goes_on)

    @cached_property
    def done(self) -> Places:
        """Held, and not read by the next rank: their gradients go home now. None at home."""
        return self._held(~self._goes_on & (self.distance > 0))

    @cached_property
    def jumps(self) -> Places:
        """This rank's own tokens that ``reader`` reads, though the one before it does not."""
        return self._own(self._reads(self.rank, self.reader) & ~self._reads(self.rank, self.visitor) & (not self._last))

    @cached_property
    def passed(self) -> Places:
        """Of what will be held after the next hop, what the rank before passes on."""
        return self._upcoming(self._had)

    @cached_property
    def jumped(self) -> Places:
        """Of what will be held after the next hop, what its owner sends."""
        return self._upcoming(~self._had)

    @cached_property
    def returned(self) -> Places:
        """This rank's own tokens whose gradients ``visitor`` sends home now. None at home."""
        home = self._reads(self.rank, self.visitor) & (self.distance > 0)
        return self._own(home if self._last else home & ~self._reads(self.rank, self.reader))

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """Where each piece of ``source`` lies in the tensors held, if it is there."""
        ends: NDArray[np.int64] = np.cumsum(self._lengths)
        return ends - self._lengths

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        lengths = self._schedule.pieces_of(self.source).length
        return np.where(self._reads(self.source, self.rank), lengths, 0) if self.distance else lengths

    @cached_property
    def _goes_on(self) -> NDArray[np.bool_]:
        return self._reads(self.source, self._schedule.next(self.rank)) & (not self._last)

    @cached_property
    def _had(self) -> NDArray[np.bool_]:
        return self._reads(self._schedule.source(self.rank, self.distance + 1), self._schedule.before(self.rank))

    def _reads(self, owner: int, reader: int) -> NDArray[np.bool_]:
        """Of every piece of a rank, whether another one, or itself, reads it."""
        return self._schedule.reads(owner, reader)

    def _held(self, chosen: NDArray[np.bool_]) -> Places:
        return Places.of(self._lengths, chosen)

    def _own(self, chosen: NDArray[np.bool_]) -> Places:
        return Places.of(self._schedule.pieces_of(self.rank).length, chosen)

    def _upcoming(self, chosen: NDArray[np.bool_]) -> Places:
        if self._last:
            return Places.whole(0)
        then = self._schedule.hops(self.rank)[self.distance + 1]
        return Places.of(then._lengths, chosen)


class RingSchedule:
    """The way of every piece for one placement and mask.

    Args:
        runs: global positions of the tokens of every rank, in local order.
        mask: in global positions.
        shift: 1 sends the ring upwards and -1 downwards. Both ways cost the same bytes; the default is the way on which
            more of them go to the neighbour, downwards where that is the same.
    """

    def __init__(
        self, runs: Sequence[Runs] | Sequence[tuple[range, ...]], mask: MaskSpec, shift: int | None = None
    ) -> None:
        self.size = len(runs)
        self._sight = Sight.of(mask)
        self._pieces = Pieces.of([_columns(of_rank) for of_rank in runs], self._sight.borders)
        self._borders = np.searchsorted(self._pieces.rank, np.arange(self.size + 1)).tolist()
        self._of_rank = [self._pieces[self.of_rank(rank)] for rank in range(self.size)]
        ascends = np.diff(self._pieces.start) > 0
        self._in_order = bool((self._pieces.step == 1).all() and (ascends | (np.diff(self._pieces.rank) > 0)).all())
        self._read_by = self._sight.readers(self._pieces, self.size)
        self.shift = self._better_shift() if shift is None else shift
        self._hops: dict[int, tuple[Hop, ...]] = {}
        self._calls: dict[int, tuple[tuple[Call, ...], ...]] = {}

    def hops(self, rank: int) -> tuple[Hop, ...]:
        """What happens on ``rank``: at home, and after each of R-1 hops."""
        if rank not in self._hops:
            self._hops[rank] = tuple(Hop(self, rank, distance) for distance in range(self.size))
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

    def of_rank(self, rank: int) -> slice:
        """Which pieces are those of a rank."""
        return slice(self._borders[rank], self._borders[rank + 1])

    def pieces_of(self, rank: int) -> Pieces:
        """The pieces of a rank."""
        return self._of_rank[rank]

    def reads(self, owner: int, reader: int) -> NDArray[np.bool_]:
        """Of every piece of ``owner``, whether ``reader`` sees it. Every rank sees its own: tokens see themselves."""
        found: NDArray[np.bool_] = self._read_by[reader, self.of_rank(owner)]
        return found

    def readers(self, rank: int) -> list[tuple[range, int, frozenset[int]]]:
        """Positions, document and readers, itself included if it is one, of every piece of ``rank``."""
        mine = self._of_rank[rank]
        who = self._read_by[:, self.of_rank(rank)].T
        return [
            (mine.positions(piece), int(mine.document[piece]), frozenset(np.flatnonzero(who[piece]).tolist()))
            for piece in range(len(mine))
        ]

    def key_tokens_sent(self, rank: int) -> int:
        """Tokens whose keys and values leave ``rank`` in one pass."""
        return sum(hop.on.count + hop.jumps.count for hop in self.hops(rank))

    def gradient_tokens_sent(self, rank: int) -> int:
        """Tokens whose key and value gradients leave ``rank``: those that it reads and does not own."""
        return sum(hop.tokens for hop in self.hops(rank)[1:])

    def work(self, hop: Hop) -> tuple[Work, ...]:
        """See `Hop.work`."""
        mine, theirs, sight = self._of_rank[hop.rank], self._of_rank[hop.source], self._sight
        pairs = Pairs.of(mine, theirs, sight.mask)
        order = np.lexsort((pairs.q, pairs.k))
        found = []
        for q, k in zip(pairs.q[order].tolist(), pairs.k[order].tolist(), strict=True):
            q_positions, k_positions = mine.positions(q), theirs.positions(k)
            q_at, k_at = int(mine.offset[q]), int(hop.places[k])
            slices = slice(q_at, q_at + len(q_positions)), slice(k_at, k_at + len(k_positions))
            found.append(Work(*slices, q_positions, k_positions))
        return tuple(found)

    def calls(self, rank: int) -> tuple[tuple[Call, ...], ...]:
        """Of every hop, see `Hop.calls`."""
        if rank not in self._calls:
            found: dict[tuple[bytes, bytes], Places] = {}

            def kept(places: Places) -> Places:
                return found.setdefault((places.starts.tobytes(), places.stops.tobytes()), places)

            mine = self._of_rank[rank]
            calls = []
            for hop in self.hops(rank):
                blocks = blocks_of(mine, self._of_rank[hop.source], hop.places, self._sight, self._in_order)
                calls.append(calls_of(blocks, kept))
            self._calls[rank] = _with_again(calls)
        return self._calls[rank]

    def _better_shift(self) -> int:
        """The way on which fewer tokens jump."""
        away = self._read_by.copy()
        away[self._pieces.rank, np.arange(len(self._pieces))] = False
        jumps: dict[int, int] = {}
        for shift in (-1, 1):
            jump = away & ~np.roll(self._read_by, shift, axis=0)
            if not jump.any():
                return shift
            jumps[shift] = int(jump.sum(0) @ self._pieces.length)
        return min(jumps, key=lambda shift: jumps[shift])


def _with_again(calls: Sequence[tuple[Call, ...]]) -> tuple[tuple[Call, ...], ...]:
    """The calls of all hops, which are told whether later ones have the same queries."""
    later: set[Places] = set()
    found = []
    for of_hop in reversed(calls):
        told = []
        for call in reversed(of_hop):
            told.append(replace(call, again=call.q in later))
            later.add(call.q)
        found.append(tuple(reversed(told)))
    return tuple(reversed(found))


def _columns(runs: Runs | tuple[range, ...]) -> Runs:
    if isinstance(runs, Runs):
        return runs
    columns = np.array([(run.start, run.step, len(run)) for run in runs if len(run)], dtype=np.int64)
    return Runs(*columns.reshape(-1, 3).T)
