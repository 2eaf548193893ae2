"""What the Triton kernels of attention share: which keys a tile sees, and which of them dropout keeps.

Imports Triton, so it is imported where one of its kernels runs. Shapes: a tile has ``M`` queries and ``N`` keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsp_plugin.kernels import dropout

GOLDEN = tl.constexpr(dropout.GOLDEN)
MIX_1, MIX_2 = tl.constexpr(dropout.MIX_1), tl.constexpr(dropout.MIX_2)
GOLDEN_32 = tl.constexpr(dropout.GOLDEN_32)
MIX_3, MIX_4, MIX_5 = (tl.constexpr(constant) for constant in (dropout.MIX_3, dropout.MIX_4, dropout.MIX_5))
# Of logarithms to the base 2, which is what GPUs exponentiate by.
LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)


@triton.jit
def stretches(first, last, size, before, after, BEFORE: tl.constexpr, AFTER: tl.constexpr, N: tl.constexpr):
    """Of the others that lines ``first .. last`` see, those that all of them see, in whole tiles of N.

    Line i sees others ``i - before .. i + after``, of ``size``; without BEFORE or AFTER that side is unbounded.

    Returns:
        ``(start, full, partial, stop)``: tiles from start to full and from partial to stop need a mask.
    """
    start = first * 0  # a number of the device, whichever branches are compiled
    if BEFORE:
        start = tl.maximum(first - before, 0)
    stop = size + first * 0
    if AFTER:
        stop = tl.minimum(last + after + 1, size)
    full = start
    if BEFORE:
        full = start + tl.cdiv(tl.maximum(last - before - start, 0), N) * N
    seen_by_all = stop
    if AFTER:
        seen_by_all = tl.minimum(first + after + 1, stop)
    partial = full + tl.maximum(seen_by_all - full, 0) // N * N
    return start, full, partial, stop


@triton.jit
def visible(i, j, rows, cols, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Whether query i sees key j; they broadcast."""
    seen = (i < rows) & (j < cols)
    if LEFT:
        seen = seen & (j >= i - left)
    if RIGHT:
        seen = seen & (j <= i + right)
    return seen


@triton.jit
def fold(state, coordinate):
    """`dropout._fold` of uint64 and int64, elementwise."""
    x = state + (coordinate + 1).to(tl.uint64) * GOLDEN
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


@triton.jit
def head_key(seed, batch, head):
    """What rows of a head fold their positions into; of integers that may be int32."""
    return fold(fold(seed.to(tl.uint64), batch.to(tl.int64)), head.to(tl.int64))


@triton.jit
def positions(start, step, index):
    """int64, of the tokens at these indices of a run."""
    return start.to(tl.int64) + step.to(tl.int64) * index.to(tl.int64)


@triton.jit
def key_lane(position):
    """What keys put into the hash."""
    return (position ^ ((position >> 32) * GOLDEN_32)).to(tl.uint32)


@triton.jit
def kept(row, lane, threshold):
    """`dropout.Dropout.keep`, of row keys (uint64) and `key_lane`; they broadcast."""
    x = lane ^ row.to(tl.uint32)
    x = (x ^ (x >> 17)) * MIX_3 + (row >> 32).to(tl.uint32)
    x = (x ^ (x >> 11)) * MIX_4
    x = (x ^ (x >> 15)) * MIX_5
    return x.to(tl.int32, bitcast=True) < threshold.to(tl.int32)


@triton.jit
def tile_of(base, index, stride, size, DIM: tl.constexpr, WIDE: tl.constexpr, BOUND: tl.constexpr):
    """``[tokens, WIDE]``: the tokens at ``index`` of one head, 0 beyond ``size`` and in columns beyond DIM."""
    columns = tl.arange(0, WIDE)
    at = base + index.to(tl.int64)[:, None] * stride + columns[None, :]
    if BOUND:
        if DIM == WIDE:
            return tl.load(at, mask=(index < size)[:, None], other=0.0)
        return tl.load(at, mask=(index < size)[:, None] & (columns < DIM)[None, :], other=0.0)
    if DIM == WIDE:
        return tl.load(at)
    return tl.load(at, mask=(columns < DIM)[None, :], other=0.0)


@triton.jit
def put_tile(base, x, index, stride, size, DIM: tl.constexpr, WIDE: tl.constexpr):
    """Writes ``[tokens, WIDE]`` to where `tile_of` reads it from."""
    columns = tl.arange(0, WIDE)
    at = base + index.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=(index < size)[:, None] & (columns < DIM)[None, :])
