"""Attention dropout that does not depend on how the work is sharded.

Whether a probability is kept is a pure function of (seed, batch row, head, query position, key position), all
global. Any rank that computes an element, in any layout, in the forward or in the backward pass, gets the same
answer; no generator state is stored or communicated. The function is the SplitMix64 finalizer (Steele, Lea, Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014) chained over the coordinates, in int64 arithmetic that
wraps around identically on CPU and CUDA.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    # int64's >> copies the sign bit down; the mask clears those copies.
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _finalize(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30)).mul_(_MIX_1)
    x = x.bitwise_xor_(_logical_shift(x, 27)).mul_(_MIX_2)
    return x.bitwise_xor_(_logical_shift(x, 31))


def _fold(state: Tensor, coordinate: Tensor) -> Tensor:
    """Appends a coordinate: state ``[...]`` and coordinate ``[n]`` give ``[..., n]``."""
    return _finalize(state[..., None] + (coordinate + 1) * _GOLDEN)


@dataclass(frozen=True)
class Dropout:
    """Dropout of one block of attention probabilities.

    Args:
        p: the probability of dropping, in ``[0, 1)``; kept probabilities are scaled by ``1 / (1 - p)``.
        seed: any integer, the same on all ranks of the sequence group, different for each layer and step.
        q_positions, k_positions: global positions of the block's queries and keys.
        head_offset: global index of the first local query head.
        batch_offset: global index of the first local batch row.
    """

    p: float
    seed: int
    q_positions: range
    k_positions: range
    head_offset: int = 0
    batch_offset: int = 0

    @property
    def scale(self) -> float:
        return 1.0 / (1.0 - self.p)

    def narrow(self, q: slice, k: slice) -> Dropout:
        """The same dropout, seen by a sub-block given in local indices."""
        return replace(self, q_positions=self.q_positions[q], k_positions=self.k_positions[k])

    def keep(self, batch: int, heads: int, device: torch.device | str) -> Tensor:
        """bool ``[batch, heads, queries, keys]``: True where the probability is kept."""

        def indices(run: range) -> Tensor:
            return torch.arange(run.start, run.stop, run.step, dtype=torch.int64, device=device)

        state = torch.full((), _signed(self.seed), dtype=torch.int64, device=device)
        state = _fold(state, indices(range(self.batch_offset, self.batch_offset + batch)))
        state = _fold(state, indices(range(self.head_offset, self.head_offset + heads)))
        state = _fold(state, indices(self.q_positions))
        state = _fold(state, indices(self.k_positions))
        # The hash is uniform over all of int64, so a share 1 - p of its values lies below this.
        return state < min(round((1.0 - self.p) * 2**64) - 2**63, 2**63 - 1)
