"""Linear attention inside chunks, as matrix products: what a chunk writes to the state, and what it reads from it.

With ``S`` the state that enters a chunk, ``G_t`` the log decay from its start up to and including token t,

    out = intra + reads @ S            S_out = T S + state

and all four of ``intra``, ``reads``, ``T`` and ``state`` come from the chunk alone, for every kind of decay. The delta
rule's updates ``u_t = beta_t (v_t - k_t^T diag(exp g_t) S_{t-1})`` depend on each other and on S; the triangular system
of a chunk, solved, gives ``u = own - seen @ S`` (the WY form, arXiv 2406.06484 and 2412.06464).

Decays only ever enter as exponentials of differences ``G_i - G_j`` with j before i, which are never positive: however
strong the decay, nothing overflows, and what underflows is zero. The sums are fp64: of two large ones the difference
matters, and the gradient of a decay is such a difference too.

Shapes here: ``[B, H, N, C, D]``, N chunks of C tokens, computed in fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import isfinite
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dsp_plugin.integers import kept_on_device
from dsp_plugin.kernels.merge import accumulation_dtype

CHUNK = 64


class Inputs(NamedTuple):
    """What one rank is given. ``q`` and ``k`` may have fewer heads than ``v``.

    Attributes:
        q, k: ``[B, n, Hk, K]``.
        v: ``[B, n, H, V]``.
        g: log decays ``[H]``, ``[B, n, H]`` or ``[B, n, H, K]``; None for no decay.
        beta: ``[B, n, H]`` for the delta rule, else None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None
    beta: Tensor | None


class Chunked(NamedTuple):
    """`Inputs` in chunks; every head with its own q and k, scaled q, and ``sums``, log decays summed up in fp64."""

    q: Tensor
    k: Tensor
    v: Tensor
    sums: Tensor | None
    beta: Tensor | None


class Written(NamedTuple):
    """The summary of each chunk, and what reading needs of the work done for it.

    Attributes:
        transition: see `linear_state`.
        state: ``[B, H, N, K, V]``.
        carry: tensors to pass on to `read`.
    """

    transition: Tensor | None
    state: Tensor
    carry: tuple[Tensor, ...]


class Read(NamedTuple):
    """What becomes of each token's query.

    Attributes:
        intra: ``[B, H, N, C, V]``, the output when no state enters the chunk.
        reads: ``[B, H, N, C, K]``, what the state that enters is multiplied by.
    """

    intra: Tensor
    reads: Tensor


@dataclass(frozen=True)
class Chunks:
    """How the n local tokens are cut into chunks of C: a chunk never holds tokens of two documents.

    Attributes:
        length: n.
        starts: local offsets at which a document starts, increasing; the state does not pass them.
    """

    length: int
    starts: tuple[int, ...] = ()

    @cached_property
    def size(self) -> int:
        """C: a power of two, for shards shorter than a full chunk no longer than needed."""
        return min(CHUNK, 1 << max(self.length - 1, 0).bit_length())

    @cached_property
    def _stretches(self) -> list[tuple[int, int]]:
        """(first chunk, chunks) of each document's part."""
        borders = sorted({0, *self.starts, self.length})
        stretches, at = [], 0
        for start, stop in pairwise(borders):
            count = -(-(stop - start) // self.size)
            stretches.append((at, count))
            at += count
        return stretches

    @cached_property
    def count(self) -> int:
        """N; one chunk of nothing where there are no tokens."""
        return max(sum(count for _, count in self._stretches), 1)

    @cached_property
    def first(self) -> frozenset[int]:
        """The chunks with which documents start."""
        borders = sorted({0, *self.starts, self.length})
        starts = set(self.starts)
        return frozenset(chunk for start, (chunk, _) in zip(borders, self._stretches, strict=False) if start in starts)

    def split(self, x: Tensor) -> Tensor:
        """``[B, n, H, D]`` to ``[B, H, N, C, D]``, padded with zeros, in the accumulation dtype."""
        x = x.transpose(1, 2).to(accumulation_dtype(x.dtype))
        if self.starts:
            x = F.pad(x, (0, 0, 0, 1)).index_select(2, self._places(x.device).token_of)
        else:
            x = F.pad(x, (0, 0, 0, self.count * self.size - self.length))
        return x.unflatten(2, (self.count, self.size))

    def join(self, x: Tensor) -> Tensor:
        """``[B, H, N, C, D]`` back to ``[B, n, H, D]``."""
        x = x.flatten(2, 3)
        x = x.index_select(2, self._places(x.device).place_of) if self.starts else x.narrow(2, 0, self.length)
        return x.transpose(1, 2)

    def filled(self, like: Tensor) -> Tensor:
        """``[N, C, 1]``: 1 where there is a token."""
        if self.starts:
            filled = self._places(like.device).token_of < self.length
        else:
            filled = torch.arange(self.count * self.size, device=like.device) < self.length
        return filled.to(like.dtype).view(self.count, self.size, 1)

    def _places(self, device: torch.device) -> _Places:
        return _Places(*_places(self, device=device))


class _Places(NamedTuple):
    """Where tokens lie in chunks that are padded, int64.

    Attributes:
        token_of: each place of each chunk; n where there is none.
        place_of: each token.
    """

    token_of: Tensor
    place_of: Tensor


@kept_on_device
def _places(chunks: Chunks) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    token_of = np.full(chunks.count * chunks.size, chunks.length)
    borders = sorted({0, *chunks.starts, chunks.length})
    for (start, stop), (chunk, _) in zip(pairwise(borders), chunks._stretches, strict=True):
        first = chunk * chunks.size
        token_of[first : first + stop - start] = np.arange(start, stop)
    return token_of, np.flatnonzero(token_of < chunks.length)


class ChunkedForm:
    """Our own form of the work inside chunks, in plain torch: it runs wherever torch does."""

    name = "chunked"

    def __init__(self, chunks: Chunks, scale: float) -> None:
        self.chunks, self._scale = chunks, scale

    def cut(self, inputs: Inputs) -> Chunked:
        """The inputs in chunks."""
        q, k, v, g, beta = inputs
        sharers = v.shape[2] // q.shape[2]
        q, k = (self.chunks.split(x).repeat_interleave(sharers, 1) for x in (q, k))
        v = self.chunks.split(v)
        sums = None
        if g is not None and g.dim() == 1:
            # Where there is no token, nothing decays either.
            sums = (g.double().view(1, -1, 1, 1, 1) * self.chunks.filled(v)).cumsum(-2)
        elif g is not None:
            sums = self.chunks.split(g if g.dim() == 4 else g.unsqueeze(-1)).double().cumsum(-2)
        weights = None if beta is None else self.chunks.split(beta.unsqueeze(-1)).to(v.dtype)
        return Chunked(q * self._scale, k, v, sums, weights)

    def write(self, x: Chunked) -> Written:
        """What each chunk does to the state."""
        k_start, k_end, whole = x.k, x.k, None
        if x.sums is not None:
            last = x.sums[..., -1:, :]
            k_end = x.k * _decay(last - x.sums, x.k)
            whole = _decay(last.mT, x.k)
        if x.beta is None:
            return Written(whole, k_end.mT @ x.v, ())
        if x.sums is not None:
            k_start = x.k * _decay(x.sums, x.k)
        overlaps = x.beta * pairs(x.k, x.k, x.sums, inclusive=False)
        right = x.beta * torch.cat([x.v, k_start], -1)
        solved = torch.linalg.solve_triangular(overlaps, right, upper=False, unitriangular=True)
        own, seen = solved.split([x.v.shape[-1], x.k.shape[-1]], -1)
        eye = torch.eye(x.k.shape[-1], dtype=x.k.dtype, device=x.k.device)
        forgotten = k_end.mT @ seen
        return Written((eye if whole is None else eye * whole) - forgotten, k_end.mT @ own, (own, seen))

    def read(self, x: Chunked, carry: tuple[Tensor, ...]) -> Read:
        """What each token gets from its own chunk, and how it reads the state."""
        weights = pairs(x.q, x.k, x.sums, inclusive=True)
        reads = x.q if x.sums is None else x.q * _decay(x.sums, x.q)
        if not carry:
            return Read(_causal(weights, x.v), reads)
        own, seen = carry
        return Read(_causal(weights, own), reads - _causal(weights, seen))


def _decay(logs: Tensor, like: Tensor) -> Tensor:
    """What log decays amount to, in the dtype that is computed in."""
    return logs.to(like.dtype).exp()


def _causal(weights: Tensor, x: Tensor) -> Tensor:
    """``weights @ x`` for lower triangular weights ``[..., C, C]``, in which no token meets what comes after it.

    A product meets it, with a weight of 0, and 0 * NaN is NaN: then the first token, too, is no number any more, which
    is quickly seen. On a device that would have to be waited for, nobody looks.
    """
    product = weights @ x
    if x.device.type != "cpu" or type(x) is not Tensor or torch.compiler.is_compiling():
        return product
    if isfinite(product.detach()[..., 0, :].sum()):
        return product
    # 0 up to the first token that is not finite, NaN from there.
    spoilt = (x.detach() * 0).cumsum(-2)
    return weights.tril() @ x.nan_to_num(0.0, 0.0, 0.0) + spoilt


def pairs(q: Tensor, k: Tensor, sums: Tensor | None, *, inclusive: bool) -> Tensor:
    """``[..., C, C]``: ``sum_d q_id k_jd exp(G_id - G_jd)`` for j before i, if ``inclusive`` for j = i too; else 0."""
    diagonal = 0 if inclusive else -1
    if sums is None:
        return (q @ k.mT).tril(diagonal)
    if sums.shape[-1] > 1:
        return _pairs_by_halves(q, k, sums, inclusive)
    later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).tril(diagonal)
    # Masked before the exponential: above the diagonal it could overflow, and 0 * inf is not a number. Nor is 0 * NaN,
    # which the other factor, or the gradient of the product, may have there.
    return (q @ k.mT).tril(diagonal) * _decay((sums - sums.mT).masked_fill(~later, -torch.inf), q)


def _pairs_by_halves(q: Tensor, k: Tensor, sums: Tensor, inclusive: bool) -> Tensor:
    """`pairs` where each key dim decays by itself.

    One product of decayed queries and decayed keys would need exponents of either sign. Of two halves of a run, though,
    every query of the second comes after every key of the first, so both decay to the border between them; what is left
    are the two halves, each by itself, down to single tokens.
    """
    size = q.shape[-2]
    itself = (q * k).sum(-1) if inclusive else torch.zeros_like(q[..., 0])
    done = itself[..., None, None]
    half = 1
    while half < size:
        q_later, k_earlier = (x.unflatten(-2, (-1, 2, half)) for x in (q, k))
        first, second = sums.unflatten(-2, (-1, 2, half)).unbind(-3)
        border = first[..., -1:, :]
        decayed_q = q_later[..., 1, :, :] * _decay(second - border, q)
        decayed_k = k_earlier[..., 0, :, :] * _decay(border - first, k)
        across = decayed_q @ decayed_k.mT
        upper = torch.cat([done[..., 0::2, :, :], torch.zeros_like(across)], -1)
        done = torch.cat([upper, torch.cat([across, done[..., 1::2, :, :]], -1)], -2)
        half *= 2
    return done.squeeze(-3)
