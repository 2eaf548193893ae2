"""Segments: the pieces of attention that one kernel call does, packed one behind the other along the sequence.

Documents of a packed sequence are segments, and so are the parts of documents that meet in a hop of a ring. Flash
kernels take all of them at once (their varlen calls); others go through them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsp_plugin.integers import kept_on_device
from dsp_plugin.kernels.blocks import Block, trimmed
from dsp_plugin.mask import Band, MaskSpec

Positions = tuple[range, range]


@dataclass(frozen=True, eq=False)
class Segments:
    """Segment s is queries ``q_borders[s]:q_borders[s + 1]`` against keys ``k_borders[s]:k_borders[s + 1]``.

    They cover the tensors given, in order; none is without queries or keys. One band holds in all of them, aligned at
    the *last* query and key of a segment as in FlashAttention: query i of n sees keys ``i + m - n - left`` up to
    ``i + m - n + right``. Every query sees a key, and the first keys may be seen by none. Where the band hides
    anything, a segment has no more queries than keys.

    Args:
        q_borders, k_borders: int32 ``[S + 1]``, from 0 to the lengths of the tensors.
        left, right: the band; None is unbounded. A bound that hides nothing becomes None.
        blocks: the global positions of each segment's queries and keys, asked for by dropout only.
    """

    q_borders: NDArray[np.int32]
    k_borders: NDArray[np.int32]
    left: int | None = None
    right: int | None = None
    blocks: Callable[[], Sequence[Positions]] | None = None

    def __post_init__(self) -> None:
        assert self.q_borders.dtype == self.k_borders.dtype == np.int32
        assert self.q_borders.shape == self.k_borders.shape
        assert self.q_borders[0] == self.k_borders[0] == 0
        rows, cols = self.rows, self.cols
        if not len(rows):
            return
        assert min(rows.min(), cols.min()) > 0, "a segment has queries and keys"
        if self.left is not None and self.left >= cols.max() - 1:
            object.__setattr__(self, "left", None)
        if self.right is not None and self.right >= rows.max() - 1:
            object.__setattr__(self, "right", None)
        if (self.left, self.right) != (None, None):
            assert min(x for x in (self.left, self.right) if x is not None) >= 0
            assert (rows <= cols).all(), "what is banded has no more queries than keys"

    @property
    def rows(self) -> NDArray[np.int32]:
        """How many queries each segment has."""
        return np.diff(self.q_borders)

    @property
    def cols(self) -> NDArray[np.int32]:
        """How many keys each segment has."""
        return np.diff(self.k_borders)

    @cached_property
    def most(self) -> tuple[int, int]:
        """The queries and the keys of the segment that has most."""
        return int(self.rows.max(initial=0)), int(self.cols.max(initial=0))

    @cached_property
    def parts(self) -> tuple[Block, ...]:
        """Each segment as a trimmed block, for who goes through them one by one."""
        left, right = self.left, self.right
        found = []
        q0 = k0 = 0
        for q1, k1 in zip(self.q_borders[1:].tolist(), self.k_borders[1:].tolist(), strict=True):
            excess = (k1 - k0) - (q1 - q0)
            band = None if left is None else left - excess, None if right is None else right + excess
            block = trimmed(q0, q1, k0, k1, *band)
            assert block is not None
            assert block.q == slice(q0, q1)
            found.append(block)
            q0, k0 = q1, k1
        return tuple(found)

    def cu_seqlens(self, device: torch.device, batch: int) -> tuple[Tensor, Tensor]:
        """int32 ``[batch S + 1]`` each: the borders of queries and keys where batch rows lie one behind the other.

        Copied to the device when first asked for.
        """
        both = _on_device(self, batch, device=device)[0]
        return both[0], both[1]


def _copied(segments: Segments, batch: int) -> tuple[NDArray[np.int32]]:
    return (np.stack([_repeated(x, batch) for x in (segments.q_borders, segments.k_borders)]),)


def _repeated(borders: NDArray[np.int32], batch: int) -> NDArray[np.int32]:
    starts = np.arange(batch, dtype=np.int32) * borders[-1]
    return np.append((starts[:, None] + borders[:-1]).ravel(), np.int32(batch * borders[-1]))


# A ring has a few for every hop, and each is asked for by every layer.
_on_device = kept_on_device(_copied, most=512)


@lru_cache(maxsize=64)
def packed_segments(mask: MaskSpec, positions: range) -> Segments | None:
    """The documents of tokens at these global positions, which attend to themselves; None where there is one.

    Args:
        positions: in order, of any step.
    """
    if mask.cu_seqlens is None or not len(positions):
        return None
    borders = _local_borders(mask.cu_seqlens, positions)
    if len(borders) == 2:
        return None

    def blocks() -> list[Positions]:
        runs = [positions[a:b] for a, b in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)]
        return [(run, run) for run in runs]

    return Segments(borders, borders, *_local_band(mask, positions.step), blocks)


@lru_cache(maxsize=64)
def packed_rows(mask: MaskSpec, rows: tuple[tuple[int, ...], ...], positions: range) -> Segments:
    """The documents of batch rows that are packed unlike and lie one behind the other.

    Args:
        mask: but for the borders.
        rows: document borders of each batch row.
        positions: of the tokens of every row; not empty.
    """
    parts = [_local_borders(row, positions)[1:] + index * len(positions) for index, row in enumerate(rows)]
    borders = np.concatenate([np.zeros(1, np.int32), *parts]).astype(np.int32)
    return Segments(borders, borders, *_local_band(mask, positions.step))


def _local_borders(cu_seqlens: tuple[int, ...], positions: range) -> NDArray[np.int32]:
    """Where documents start and end among the positions, those without any left out."""
    # Of each border, how many of the positions lie before it.
    before = -((positions.start - np.asarray(cu_seqlens, dtype=np.int64)) // positions.step)
    borders = np.unique(before.clip(0, len(positions))).astype(np.int32)
    assert borders[0] == 0
    assert borders[-1] == len(positions), f"position {positions[-1]} lies beyond the last border {cu_seqlens[-1]}"
    return borders


def _local_band(mask: MaskSpec, step: int) -> Band:
    left, right = mask.band()
    return None if left is None else left // step, None if right is None else right // step
