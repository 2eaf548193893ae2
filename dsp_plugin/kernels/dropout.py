"""Attention dropout that does not depend on how the work is sharded.

Whether a probability is kept is a pure function of (seed, batch row, head, query position, key position), all
global. Any rank that computes an element, in any layout, in the forward or in the backward pass, gets the same
answer; no generator state is stored or communicated.

A row of probabilities has a key of 64 bits: the SplitMix64 finalizer (Steele, Lea, Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014) chained over (seed, batch row, head, query position). What there is an
element of has to be cheap, and GPUs multiply integers of 32 bits at a fraction of the rate of floats, those of 64 bits
at a fraction of that: it is a bijection of 32 bits of three multiplications (C. Wellons, hash-prospector, "triple32",
less its last step, which changes lower bits only) of the key position, with half of the row's key before each of the
first two. Two multiplications are not enough: keys 4,096 apart are correlated by 1 %. So rows are told apart by 64
bits, a row has another value for each key position below 2**32, and all is arithmetic that wraps around identically on
CPU, on CUDA and in `dsp_plugin.kernels.triton_tiles`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def _signed(value: int, bits: int = 64) -> int:
    value &= 2**bits - 1
    return value - 2**bits if value >= 2 ** (bits - 1) else value


# Of SplitMix64, and of the permutation of 32 bits; GOLDEN_32 tells key positions apart that share their lower 32 bits.
GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
GOLDEN_32, MIX_3, MIX_4, MIX_5 = 0x1E3779B1, 0xED5AD4BB, 0xAC4C1B51, 0x31848BAB


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    # The >> of signed integers copies the sign bit down; the mask clears those copies.
    return (x >> bits).bitwise_and_((1 << (x.element_size() * 8 - bits)) - 1)


def _finalize(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30)).mul_(_signed(MIX_1))
    x = x.bitwise_xor_(_logical_shift(x, 27)).mul_(_signed(MIX_2))
    return x.bitwise_xor_(_logical_shift(x, 31))


def _fold(state: Tensor, coordinate: Tensor) -> Tensor:
    """Appends a coordinate: state ``[...]`` and coordinate ``[n]`` give ``[..., n]``."""
    return _finalize(state[..., None] + (coordinate + 1) * _signed(GOLDEN))


def _lower(x: Tensor) -> Tensor:
    """The lower half of int64, as int32."""
    return ((x << 32) >> 32).to(torch.int32)


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

    @property
    def bits(self) -> int:
        """The seed, as int64."""
        return _signed(self.seed)

    @property
    def threshold(self) -> int:
        """A hash of 32 bits is kept where it lies below; it is uniform over all of int32."""
        return min(round((1.0 - self.p) * 2**32) - 2**31, 2**31 - 1)

    def narrow(self, q: slice, k: slice) -> Dropout:
        """The same dropout, seen by a sub-block given in local indices."""
        return replace(self, q_positions=self.q_positions[q], k_positions=self.k_positions[k])

    def keep(self, batch: int, heads: int, device: torch.device | str) -> Tensor:
        """bool ``[batch, heads, queries, keys]``: True where the probability is kept."""

        def indices(run: range) -> Tensor:
            return torch.arange(run.start, run.stop, run.step, dtype=torch.int64, device=device)

        row = torch.full((), self.bits, dtype=torch.int64, device=device)
        row = _fold(row, indices(range(self.batch_offset, self.batch_offset + batch)))
        row = _fold(row, indices(range(self.head_offset, self.head_offset + heads)))
        row = _fold(row, indices(self.q_positions))[..., None]
        keys = indices(self.k_positions)
        x = _lower(keys ^ ((keys >> 32) * GOLDEN_32)) ^ _lower(row)
        x = x.bitwise_xor_(_logical_shift(x, 17)).mul_(_signed(MIX_3, 32)).add_(_lower(row >> 32))
        x = x.bitwise_xor_(_logical_shift(x, 11)).mul_(_signed(MIX_4, 32))
        x = x.bitwise_xor_(_logical_shift(x, 15)).mul_(MIX_5)
        return x < self.threshold
