"""The one decomposition of a mask into blocks that every kernel, and ring attention, works on.

A block is a run of queries and a run of keys with a band: in coordinates local to the block, query ``i`` sees key
``j`` iff ``-left <= j - i <= right`` (``None`` is unbounded). Causal, window, packed and their combinations, at any
offset between the runs and for any common stride, come down to blocks, because a band shifted by an offset, or
sampled with a stride, is again a band.

Blocks are always *trimmed*: every query of a block sees at least one of its keys, every key is seen by at least one
of its queries, and a bound that excludes nothing is ``None``. Kernels rely on it: no row of a block is empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dsp_plugin.mask import Band, MaskSpec


@dataclass(frozen=True)
class Block:
    """Queries ``q`` and keys ``k`` (slices of the caller's local tensors) under the band ``(left, right)``."""

    q: slice
    k: slice
    left: int | None
    right: int | None

    @property
    def rows(self) -> int:
        return int(self.q.stop - self.q.start)

    @property
    def cols(self) -> int:
        return int(self.k.stop - self.k.start)

    @property
    def band(self) -> Band:
        return self.left, self.right

    @property
    def is_full(self) -> bool:
        return self.left is None and self.right is None

    @property
    def is_causal(self) -> bool:
        """Whether the band is exactly ``j <= i`` in the block's own coordinates (aligned at the first row)."""
        return self.left is None and self.right == 0

    def restrict(self, q: slice, k: slice) -> Block | None:
        """The trimmed part of this block inside ``q`` x ``k``, in the coordinates of ``self.q`` and ``self.k``."""
        q0, q1 = max(q.start, self.q.start), min(q.stop, self.q.stop)
        k0, k1 = max(k.start, self.k.start), min(k.stop, self.k.stop)
        shift = (k0 - self.k.start) - (q0 - self.q.start)
        return trimmed(q0, q1, k0, k1, *_shifted(self.left, self.right, shift))

    def visible(self, device: torch.device | str) -> Tensor:
        """bool ``[rows, cols]``: which key each query sees."""
        distance = torch.arange(self.cols, device=device)[None, :] - torch.arange(self.rows, device=device)[:, None]
        seen = torch.ones(self.rows, self.cols, dtype=torch.bool, device=device)
        if self.left is not None:
            seen &= distance >= -self.left
        if self.right is not None:
            seen &= distance <= self.right
        return seen


def _shifted(left: int | None, right: int | None, shift: int) -> Band:
    """The band in coordinates where the first key moved ``shift`` further than the first query."""
    return (None if left is None else left + shift), (None if right is None else right - shift)


def trimmed(q0: int, q1: int, k0: int, k1: int, left: int | None, right: int | None) -> Block | None:
    """The trimmed block of queries ``[q0, q1)`` and keys ``[k0, k1)`` under a band local to ``(q0, k0)``.

    None where nothing is seen.
    """
    rows, cols = q1 - q0, k1 - k0
    if rows <= 0 or cols <= 0 or (left is not None and right is not None and left + right < 0):
        return None
    first = 0 if right is None else max(0, -right)
    stop = rows if left is None else min(rows, cols + left)
    if first >= stop:
        return None
    low = 0 if left is None else max(0, first - left)
    high = cols if right is None else min(cols, stop + right)
    left, right = _shifted(left, right, low - first)
    if left is not None and left >= stop - first - 1:
        left = None
    if right is not None and right >= high - low - 1:
        right = None
    return Block(slice(q0 + first, q0 + stop), slice(k0 + low, k0 + high), left, right)


def trim(rows: int, cols: int, band: Band) -> Block | None:
    """The trimmed block of a whole ``rows`` x ``cols`` rectangle under ``band``; None if nothing is seen."""
    return trimmed(0, rows, 0, cols, *band)


@lru_cache(maxsize=4096)
def blocks(mask: MaskSpec, q_positions: range, k_positions: range) -> tuple[Block, ...]:
    """The blocks of a run of queries against a run of keys; empty ones are dropped, documents are separate blocks.

    Args:
        mask: the mask, in global positions.
        q_positions, k_positions: global positions of the runs, in local order. A contiguous run has step 1; the two
            runs of a striped layout share its step.

    Returns:
        Blocks whose query slices are disjoint, and whose key slices are disjoint.
    """
    if not len(q_positions) or not len(k_positions):
        return ()
    step = q_positions.step if len(q_positions) > 1 else k_positions.step
    assert step > 0
    assert all(run.step == step or len(run) == 1 for run in (q_positions, k_positions))
    left, right = mask.band()
    offset = k_positions.start - q_positions.start
    # -left <= offset + step (j - i) <= right, solved for the integer j - i.
    left = None if left is None else (left + offset) // step
    right = None if right is None else (right - offset) // step

    found = []
    for document in _documents(mask, q_positions, k_positions):
        q0, q1 = _span(q_positions, step, document)
        k0, k1 = _span(k_positions, step, document)
        block = trimmed(q0, q1, k0, k1, *_shifted(left, right, k0 - q0))
        if block is not None:
            found.append(block)
    return tuple(found)


def _documents(mask: MaskSpec, q_positions: range, k_positions: range) -> tuple[range, ...]:
    end = max(q_positions[-1], k_positions[-1]) + 1
    if mask.cu_seqlens is None:
        return (range(end),)
    assert end <= mask.cu_seqlens[-1], f"position {end - 1} lies beyond the last document border {mask.cu_seqlens[-1]}"
    return mask.documents(mask.cu_seqlens[-1])


def _span(positions: range, step: int, document: range) -> tuple[int, int]:
    """Local indices ``[first, stop)`` of the positions that lie in the document."""

    def index(position: int) -> int:
        return min(max(-((positions.start - position) // step), 0), len(positions))

    return index(document.start), index(document.stop)


def tiles(block: Block, rows: int, cols: int) -> Iterator[Block]:
    """Cuts a block into trimmed tiles of at most ``rows`` x ``cols``, row by row, without those that see nothing."""
    for q0 in range(block.q.start, block.q.stop, rows):
        strip = block.restrict(slice(q0, q0 + rows), block.k)
        if strip is None:
            continue
        for k0 in range(strip.k.start, strip.k.stop, cols):
            tile = strip.restrict(strip.q, slice(k0, k0 + cols))
            if tile is not None:
                yield tile
