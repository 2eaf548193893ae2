"""What a rank computes with the keys that it holds, in as few calls of a kernel as can be.

A block of queries and keys under one band is a segment of a call, and a call takes all segments of one band whose
keys do not overlap. Runs are joined first: in zigzag order both runs of a rank's queries see all keys of an earlier
rank's early run, the late one sees all keys of a later rank, and at home a document's tokens in local order are one
causal triangle. So a causal mask, or none, is one call a hop, whatever the documents; in striped order, too. A window
that documents do not fit into adds the blocks that it cuts in two: those of equal distance to its end share a call, so
one run or one long document takes three calls at most, and documents of unlike lengths in zigzag order a call each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsp_plugin.kernels.blocks import Block
from dsp_plugin.kernels.call import AttentionCall
from dsp_plugin.kernels.segments import Segments
from dsp_plugin.kernels.softmax import block_backward, block_forward, segments_backward, segments_forward
from dsp_plugin.kernels.windowed import expressible
from dsp_plugin.methods.places import Places
from dsp_plugin.methods.ring_pieces import FAR, Column, Pairs, Pieces, Sight


@dataclass(frozen=True, eq=False)
class Call:
    """What one call computes.

    Attributes:
        q: the queries, in this rank's tensors; the same object wherever they are the same.
        k: the keys, in the tensors held.
        what: segments of these; or the global positions of both, each a run, where that is what the result depends on.
        again: whether a later call has the same queries.
    """

    q: Places
    k: Places
    what: Segments | tuple[range, range]
    again: bool = False

    @property
    def every_query_sees(self) -> bool:
        """Whether each of the queries sees a key."""
        return isinstance(self.what, Segments)

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of its queries and keys."""
        if isinstance(self.what, Segments):
            return segments_forward(call, q, k, v, self.what)
        return block_forward(call, q, k, v, *self.what)

    def backward(self, call: AttentionCall, dout: Tensor, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)``, given q, k, v, and the out and lse of attention to all keys."""
        q, k, v, out, lse = saved
        if isinstance(self.what, Segments):
            return segments_backward(call, dout, q, k, v, out, lse, self.what)
        return block_backward(call, dout, q, k, v, out, lse, *self.what)


class Blocks(NamedTuple):
    """Queries ``q0:q1`` of a rank's tensors, which see keys ``k0:k1`` of those held.

    Query i sees key j iff ``i + low <= j <= i + high``, where each is counted in its tensor; `FAR` is unbounded.
    Trimmed: every query sees a key, every key is seen, and a bound that excludes nothing is `FAR`.
    """

    q0: Column
    q1: Column
    k0: Column
    k1: Column
    low: Column
    high: Column

    def some(self, chosen: NDArray[np.bool_] | Column) -> Blocks:
        """The chosen ones."""
        return Blocks(*(column[chosen] for column in self))

    @property
    def number(self) -> int:
        """How many there are."""
        return len(self.q0)


def blocks_of(mine: Pieces, theirs: Pieces, places: Column, sight: Sight, in_order: bool) -> Blocks:
    """All blocks of a rank's queries and of the keys that it holds of another, or of itself.

    Args:
        places: where each piece of ``theirs`` lies in the tensors held; not read for those that no query sees.
        in_order: all runs are without gaps, and those of every rank ascend.
    """
    by_document = sight.simple if in_order else np.zeros_like(sight.simple)
    blocks, rest = _of_documents(mine, theirs, places, sight, by_document)
    if by_document.all() and not len(rest):
        return blocks
    chosen = np.flatnonzero(~by_document[mine.document] | np.isin(mine.document, rest))
    others = _joined(_of_pairs(mine[chosen], theirs, places, sight))
    together = Blocks(*(np.concatenate(columns) for columns in zip(blocks, others, strict=True)))
    return together.some(np.lexsort((together.k0, together.q0)))


def _of_documents(
    mine: Pieces, theirs: Pieces, places: Column, sight: Sight, chosen: NDArray[np.bool_]
) -> tuple[Blocks, Column]:
    """Of each of the chosen documents, in which the mask is causal or none, the one block that all runs make.

    Returns:
        The blocks, and the documents in which they are not one.
    """
    documents, first, last = mine.units
    their_documents, first_key, last_key = theirs.units
    if not (np.array_equal(documents, their_documents) and chosen.all()):
        at = np.searchsorted(their_documents, documents)
        shared = np.append(their_documents, -1)[at] == documents
        shared &= chosen[documents]
        documents, first, last, at = (column[shared] for column in (documents, first, last, at))
        first_key, last_key = first_key[at], last_key[at]
    rest = documents[:0]
    causal, home = sight.mask.band()[1] == 0, mine is theirs
    if causal and not home:
        # What comes after the first key, and what comes before the last query.
        first = np.searchsorted(mine.start, theirs.start[first_key])
        last_key = np.searchsorted(theirs.start, mine.start[last]) - 1
        seen = first <= last
        documents, first, last = documents[seen], first[seen], last[seen]
        first_key, last_key = first_key[seen], last_key[seen]
        full = theirs.start[last_key] < mine.start[first]
        if not full.all():
            rest = documents[~full]
            first, last, first_key, last_key = first[full], last[full], first_key[full], last_key[full]
    q0, q1 = mine.offset[first], mine.offset[last] + mine.length[last]
    k0, k1 = places[first_key], places[last_key] + theirs.length[last_key]
    high = np.where((q1 - q0 > 1) & (causal and home), k0 - q0, FAR)
    return Blocks(q0, q1, k0, k1, np.full_like(q0, -FAR), high), rest


def _of_pairs(mine: Pieces, theirs: Pieces, places: Column, sight: Sight) -> Blocks:
    """The block of every two pieces that see each other."""
    pairs = Pairs.of(mine, theirs, sight.mask)
    rows, cols = mine.length[pairs.q], theirs.length[pairs.k]
    q, k, left, right = mine.offset[pairs.q], places[pairs.k], pairs.left, pairs.right
    q0, q1 = np.maximum(-right, 0), np.minimum(rows, cols + left)
    k0, k1 = np.maximum(q0 - left, 0), np.minimum(cols, q1 + right)
    low = np.where(left >= q1 - 1 - k0, -FAR, k - q - left)
    high = np.where(right >= k1 - 1 - q0, FAR, k - q + right)
    return Blocks(q + q0, q + q1, k + k0, k + k1, low, high)


def _joined(blocks: Blocks) -> Blocks:
    """Neighbours whose union is again a block made one: first those of the same queries, then those of the same keys
    or under one band."""
    for union in (_beside, _below):
        while blocks.number > 1:
            index = np.arange(blocks.number)
            joined, possible = union(blocks.some(index[:-1]), blocks.some(index[1:]))
            if not possible.any():
                break
            # In a row of possible unions, every other one.
            since = index[:-1] - np.maximum.accumulate(np.where(possible, 0, index[1:]))
            taken = possible & (since % 2 == 0)
            kept = np.append(True, ~taken)
            blocks = Blocks(
                *(
                    np.where(np.append(taken, False), np.append(new, 0), old)[kept]
                    for new, old in zip(joined, blocks, strict=True)
                )
            )
    return blocks


def _beside(a: Blocks, b: Blocks) -> tuple[Blocks, NDArray[np.bool_]]:
    """Unions of blocks with those of the next keys, and which of them are blocks."""
    possible = (a.q0 == b.q0) & (a.q1 == b.q1) & (a.k1 == b.k0) & (a.high == FAR) & (b.low == -FAR)
    return Blocks(a.q0, a.q1, a.k0, b.k1, a.low, b.high), possible


def _below(a: Blocks, b: Blocks) -> tuple[Blocks, NDArray[np.bool_]]:
    """Unions of blocks with those of the next queries, and which of them are blocks.

    They are where the union, cut down to the queries of one of the two, is that block. A single query is under any
    band that ends where what it sees ends.
    """
    one_above, one_below = a.q1 - a.q0 == 1, b.q1 - b.q0 == 1
    high = np.where((a.high == FAR) & one_above & (a.k1 < b.k1), a.k1 - 1 - a.q0, a.high)
    low = np.where((b.low == -FAR) & one_below & (b.k0 > a.k0), b.k0 - b.q0, b.low)
    above = (a.k1 == b.k1) | (a.q1 + high <= a.k1)
    below = (b.high == high) | ((b.high == FAR) & (b.q0 + high >= b.k1 - 1))
    ends = np.where(high == FAR, (b.high == FAR) & (a.k1 == b.k1), (a.k1 <= b.k1) & above & below)
    below = (a.k0 == b.k0) | (b.q0 + low >= b.k0)
    above = (a.low == low) | ((a.low == -FAR) & (a.q1 - 1 + low <= a.k0))
    starts = np.where(low == -FAR, (a.low == -FAR) & (a.k0 == b.k0), (a.k0 <= b.k0) & above & below)
    return Blocks(a.q0, b.q1, a.k0, b.k1, low, high), (a.q1 == b.q0) & starts & ends


def calls_of(blocks: Blocks, kept: Callable[[Places], Places]) -> tuple[Call, ...]:
    """The blocks in as few calls as bands and overlapping keys allow, the one with most queries first.

    Args:
        blocks: ordered by queries.
        kept: the same object for the same places.
    """
    if not blocks.number:
        return ()
    rows, cols = blocks.q1 - blocks.q0, blocks.k1 - blocks.k0
    wide = (rows > cols) & ((blocks.low != -FAR) | (blocks.high != FAR))
    if wide.any():
        blocks = _expressible(blocks, wide)
    # As FlashAttention has it: how far the last query sees beyond and before the last key.
    excess = blocks.k1 - blocks.q1
    left = np.where(blocks.low == -FAR, FAR, excess - blocks.low)
    right = np.where(blocks.high == FAR, FAR, blocks.high - excess)
    found = []
    for band, chosen in _by_band(blocks, left, right):
        segments = Segments(_borders(chosen.q0, chosen.q1), _borders(chosen.k0, chosen.k1), *band)
        found.append(Call(kept(Places(chosen.q0, chosen.q1)), Places(chosen.k0, chosen.k1), segments))
    return tuple(sorted(found, key=lambda call: -call.q.count))


def _by_band(blocks: Blocks, left: Column, right: Column) -> Iterator[tuple[tuple[int | None, int | None], Blocks]]:
    """Blocks that one call can take, each once, and their band; bounds that exclude most come first."""
    rows, cols = blocks.q1 - blocks.q0, blocks.k1 - blocks.k0
    there = np.ones(blocks.number, dtype=bool)
    while there.any():
        band_left = int(left[there].min())
        band_right = int(right[there & (left == band_left)].min())
        # A block without a bound takes one that excludes nothing of it.
        fits = (left == band_left) | ((left == FAR) & (cols - 1 <= band_left))
        fits &= (right == band_right) | ((right == FAR) & (rows - 1 <= band_right))
        if (band_left, band_right) != (FAR, FAR):
            fits &= rows <= cols
        index = np.flatnonzero(fits & there)
        there[index] = False
        while len(index):
            reached = np.maximum.accumulate(blocks.k1[index])
            after = np.append(True, blocks.k0[index[1:]] >= reached[:-1])
            after[1:] &= blocks.q0[index[1:]] >= np.maximum.accumulate(blocks.q1[index])[:-1]
            yield (
                (None if band_left == FAR else band_left, None if band_right == FAR else band_right),
                blocks if len(index) == blocks.number and after.all() else blocks.some(index[after]),
            )
            index = index[~after]


def _expressible(blocks: Blocks, chosen: NDArray[np.bool_]) -> Blocks:
    """The chosen blocks cut by queries until flash kernels have a window for each part."""
    parts = []
    for q0, q1, k0, k1, low, high in zip(*(column.tolist() for column in blocks.some(chosen)), strict=True):
        shift = k0 - q0
        band = None if low == -FAR else shift - low, None if high == FAR else high - shift
        for part in expressible(Block(slice(q0, q1), slice(k0, k1), *band)):
            shift = part.k.start - part.q.start
            low_, high_ = (
                -FAR if part.left is None else shift - part.left,
                FAR if part.right is None else shift + part.right,
            )
            parts.append((part.q.start, part.q.stop, part.k.start, part.k.stop, low_, high_))
    cut = zip(*parts, strict=True)
    together = Blocks(
        *(np.append(whole, np.array(new)) for whole, new in zip(blocks.some(~chosen), cut, strict=True)),
    )
    return together.some(np.lexsort((together.k0, together.q0)))


def _borders(starts: Column, stops: Column) -> NDArray[np.int32]:
    return np.append(0, np.cumsum(stops - starts)).astype(np.int32)
