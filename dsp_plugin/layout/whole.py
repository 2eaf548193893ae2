"""Which packed documents live whole on one rank, and on which, so that ranks have alike much to attend to.

A document that is cut in 2P runs sends its keys to every rank, and a run shorter than a kernel's tile is computed as if
it filled it. So short ones are dealt to ranks whole: sorted by length, in rounds of P, in each of which the rank that
has least gets the longest. Whatever the order within rounds, ranks then differ by less than the longest of them, in
tokens and in pairs, as no document of a round is longer than any of the round before. Tokens are then made equal: ranks
with too many hand documents on, and cut at most one each time.

Numbers are whole throughout: ranks on unlike machines come to the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dsp_plugin.layout.runs import Column, folded, zigzag_borders

MOST_OVER = 20
"""Documents stay whole where no rank has more pairs than the mean by more than a part in so many."""
_TRIES = 5
# Beyond these the documents left are the shortest, and which rank gets which of a round matters little.
_ROUNDS_BY_LOAD = 32
# Pairs of longer sequences do not fit 64 bits.
_LONGEST = 2**31


class Pieces(NamedTuple):
    """Documents that are whole on a rank, and parts of those that are cut to make tokens equal: columns.

    Attributes:
        starts, stops: the positions.
        first: where the document starts.
        length: of the document.
        rank: who holds it.
    """

    starts: Column
    stops: Column
    first: Column
    length: Column
    rank: Column

    def pairs(self, size: int) -> tuple[Column, Column]:
        """By rank, what its queries see: in causal attention, and in full."""
        causal, full = _pairs(self.starts, self.stops, self.first, self.length)
        return _by_rank(causal, self.rank, size), _by_rank(full, self.rank, size)


class Dealt(NamedTuple):
    """Who holds what.

    Attributes:
        borders: of the runs of documents that are cut in zigzag, ``[documents, 2P + 1]``.
        pieces: of all others.
    """

    borders: Column
    pieces: Pieces


_NONE = Pieces(*(np.empty(0, dtype=np.int64) for _ in Pieces._fields))


def deal(starts: Column, lengths: Column, size: int, below: int) -> Dealt:
    """The documents that are ``lengths`` long, all of them at least 1, on ``size`` ranks.

    Args:
        below: shorter ones live whole on one rank where that is balanced, see `MOST_OVER`; where it is not, those
            shorter than half of it, and so on. None if no try is balanced.
    """
    longest = int(lengths.max(initial=0))
    below = min(below, longest + 1)
    tries = _TRIES if size > 1 and int(lengths.sum()) < _LONGEST else 0
    for _ in range(tries):
        short = lengths < below
        if np.count_nonzero(short) < size:
            break
        dealt = _dealt(starts, lengths, short, size)
        if dealt is not None:
            return dealt
        below //= 2
    return Dealt(zigzag_borders(starts, lengths, size), _NONE)


def _dealt(starts: Column, lengths: Column, short: np.ndarray, size: int) -> Dealt | None:
    """The short ones whole; None where that is not balanced."""
    borders = zigzag_borders(starts[~short], lengths[~short], size)
    runs = borders[:, :-1], borders[:, 1:]
    causal, full = (folded(x.sum(0)) for x in _pairs(*runs, borders[:, :1], lengths[~short][:, None]))
    tokens = folded((runs[1] - runs[0]).sum(0))

    first, length = starts[short], lengths[short]
    order = np.argsort(-length, kind="stable")
    first, length = first[order], length[order]
    rank = _in_rounds(length, causal)
    pieces = Pieces(first, first + length, first, length, rank)
    tokens = tokens + _by_rank(length, rank, size)
    pieces = _levelled(pieces, tokens, causal + pieces.pairs(size)[0])
    mine = pieces.pairs(size)
    balanced = all(_balanced(cut + whole) for cut, whole in zip((causal, full), mine, strict=True))
    return Dealt(borders, pieces) if balanced else None


def _balanced(pairs: Column) -> bool:
    return int(pairs.max()) * len(pairs) * MOST_OVER <= int(pairs.sum()) * (MOST_OVER + 1)


def _in_rounds(length: Column, pairs: Column) -> Column:
    """The rank of each document, the longest first, on ranks that have ``pairs`` without them."""
    size = len(pairs)
    load, ranks = pairs.tolist(), range(size)
    found: list[int] = []
    by_load = length[: size * _ROUNDS_BY_LOAD]
    areas = (by_load * (by_load + 1) // 2).tolist()
    for at in range(0, len(areas), size):
        for rank, area in zip(sorted(ranks, key=load.__getitem__), areas[at : at + size], strict=False):
            load[rank] += area
            found.append(rank)
    rest = np.arange(len(length) - len(areas))
    turn, place = np.divmod(rest, size)
    lightest = np.array(sorted(ranks, key=load.__getitem__))
    return np.concatenate([np.array(found, dtype=np.int64), lightest[np.where(turn % 2, size - 1 - place, place)]])


def _levelled(pieces: Pieces, tokens: Column, pairs: Column) -> Pieces:
    """The pieces, with tokens moved until ranks differ by at most one."""
    size = len(tokens)
    least, extra = divmod(int(tokens.sum()), size)
    most_first = np.argsort(-tokens, kind="stable")
    wanted = np.full(size, least)
    wanted[most_first[:extra]] += 1
    over = (tokens - wanted).tolist()
    takers = [rank for rank in most_first.tolist() if over[rank] < 0]
    moved = _Moves(pieces, pairs.tolist())
    for giver in [rank for rank in most_first.tolist() if over[rank] > 0]:
        while over[giver]:
            count = min(over[giver], -over[takers[-1]])
            moved.move(count, giver, takers[-1])
            over[giver] -= count
            over[takers[-1]] += count
            if not over[takers[-1]]:
                takers.pop()
    return moved.pieces()


class _Moves:
    """Pieces on their way from ranks with too many tokens."""

    def __init__(self, pieces: Pieces, pairs: list[int]) -> None:
        self._columns = [column.copy() for column in pieces]
        self._more: list[tuple[int, ...]] = []
        self._pairs = pairs

    def pieces(self) -> Pieces:
        if not self._more:
            return Pieces(*self._columns)
        more = np.array(self._more, dtype=np.int64).T
        return Pieces(*(np.concatenate([column, new]) for column, new in zip(self._columns, more, strict=True)))

    def move(self, count: int, giver: int, taker: int) -> None:
        """``count`` tokens: of the shortest document that has as many, or the longest ones until one has."""
        starts, stops, _, _, rank = self._columns
        while count:
            own = np.flatnonzero(rank == giver)
            sizes = stops[own] - starts[own]
            enough = sizes >= count
            if enough.any():
                chosen = int(own[np.where(enough, sizes, _LONGEST).argmin()])
                self._cut(chosen, count, giver, taker)
                return
            chosen = int(own[sizes.argmax()])
            rank[chosen] = taker
            count -= int(sizes.max())
            self._hand(self._area(chosen), giver, taker)

    def _cut(self, piece: int, count: int, giver: int, taker: int) -> None:
        """The first or the last tokens of a piece, whichever leaves the two ranks closer to each other in pairs."""
        starts, stops, firsts, lengths, rank = self._columns
        start, stop, first = int(starts[piece]), int(stops[piece]), int(firsts[piece])
        if stop - start == count:
            rank[piece] = taker
            self._hand(self._area(piece), giver, taker)
            return
        ahead = self._pairs[giver] - self._pairs[taker]
        ways = [(start, start + count), (stop - count, stop)]
        areas = [_triangle(a, b, first) for a, b in ways]
        area, (a, b) = min(zip(areas, ways, strict=True), key=lambda way: abs(ahead - 2 * way[0]))
        self._more.append((a, b, first, int(lengths[piece]), taker))
        starts[piece], stops[piece] = (b, stop) if a == start else (start, a)
        self._hand(area, giver, taker)

    def _area(self, piece: int) -> int:
        starts, stops, firsts, _, _ = self._columns
        return _triangle(int(starts[piece]), int(stops[piece]), int(firsts[piece]))

    def _hand(self, area: int, giver: int, taker: int) -> None:
        self._pairs[giver] -= area
        self._pairs[taker] += area


def _triangle(start: int, stop: int, first: int) -> int:
    return (stop - start) * (start + stop + 1 - 2 * first) // 2


def _pairs(starts: Column, stops: Column, first: Column, length: Column) -> tuple[Column, Column]:
    """How many keys the queries from ``starts`` to ``stops`` see: in causal attention, and in full."""
    count = stops - starts
    return count * (starts + stops + 1 - 2 * first) // 2, count * length


def _by_rank(values: Column, rank: Column, size: int) -> Column:
    sums = np.zeros(size, dtype=np.int64)
    np.add.at(sums, rank, values)
    return sums
