"""Attention of a block in one launch of a Triton kernel, with dropout (Dao, FlashAttention-2, arXiv 2307.08691)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsp_plugin.kernels.kernel import BlockSpec
from dsp_plugin.kernels.triton_launch import FORWARD, arguments, sizes
from dsp_plugin.kernels.triton_tiles import (
    LN_2,
    LOG2_E,
    fold,
    head_key,
    kept,
    key_lane,
    positions,
    put_tile,
    stretches,
    tile_of,
    visible,
)
from dsp_plugin.kernels.triton_usable import launching


@triton.jit
def _attend(
    acc, highest, total, queries, i, row_keys, k, v, k_n, v_n,
    start, stop, rows, cols, left, right, scale, threshold, k_start,
    k_step, D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys ``start .. stop``."""
    for first in range(start, stop, N):
        j = first + tl.arange(0, N)
        keys = tile_of(k, j, k_n, cols, D, WIDE, MASKED)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        if MASKED:
            seen = visible(i[:, None], j[None, :], rows, cols, left, right, LEFT, RIGHT)
            scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, 1))
        # Rows that have seen no key so far.
        shift = tl.where(above == float("-inf"), 0.0, above) if MASKED else above
        weights = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(highest - shift)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            lane = key_lane(positions(k_start, k_step, j))
            weights = tl.where(kept(row_keys[:, None], lane[None, :], threshold), weights, 0.0)
        values = tile_of(v, j, v_n, cols, DV, WIDE_V, MASKED)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        highest = above
    return acc, highest, total


@triton.jit(do_not_specialize=["rows", "cols", "left", "right"])
def forward_kernel(
    q, k, v, out, lse,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    rows, cols, group, left, right, scale,
    seed: tl.int64, threshold: tl.int32, keep_scale, q_start: tl.int64, q_step: tl.int64, k_start: tl.int64,
    k_step: tl.int64, first_head: tl.int64, first_row: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: M queries of one head."""
    heads = tl.num_programs(1)
    # The last queries, which see most keys under a causal mask, come first.
    scale *= LOG2_E
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    head, batch = tl.program_id(1), tl.program_id(2)
    kv_head = head // group
    q += batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    k += batch.to(tl.int64) * k_b + kv_head.to(tl.int64) * k_h
    v += batch.to(tl.int64) * v_b + kv_head.to(tl.int64) * v_h
    i = first + tl.arange(0, M)
    queries = tile_of(q, i, q_n, rows, D, WIDE, True)
    row_keys = tl.zeros([M], tl.uint64)
    if DROPOUT:
        row_keys = fold(head_key(seed, first_row + batch, first_head + head), positions(q_start, q_step, i))
    last = tl.minimum(first + M, rows) - 1
    start, full, partial, stop = stretches(first, last, cols, left, right, LEFT, RIGHT, N)

    acc = tl.zeros([M, WIDE_V], tl.float32)
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    if LEFT:
        acc, highest, total = _attend(
            acc, highest, total, queries, i, row_keys, k, v, k_n, v_n, start, tl.minimum(full, stop), rows, cols, left,
            right, scale, threshold, k_start, k_step, D, DV, WIDE, WIDE_V, N, LEFT, RIGHT, DROPOUT, True, PRECISION,
        )  # fmt: skip
    acc, highest, total = _attend(
        acc, highest, total, queries, i, row_keys, k, v, k_n, v_n, full, partial, rows, cols, left, right, scale,
        threshold, k_start, k_step, D, DV, WIDE, WIDE_V, N, LEFT, RIGHT, DROPOUT, False, PRECISION,
    )  # fmt: skip
    acc, highest, total = _attend(
        acc, highest, total, queries, i, row_keys, k, v, k_n, v_n, partial, stop, rows, cols, left, right, scale,
        threshold, k_start, k_step, D, DV, WIDE, WIDE_V, N, LEFT, RIGHT, DROPOUT, True, PRECISION,
    )  # fmt: skip

    empty = total == 0.0
    weight = keep_scale / tl.where(empty, 1.0, total)
    row = (batch.to(tl.int64) * heads + head) * rows
    out += batch.to(tl.int64) * rows * heads * DV + head * DV
    put_tile(out, acc * weight[:, None], i, heads * DV, rows, DV, WIDE_V)
    logarithm = (highest + tl.log2(tl.where(empty, 1.0, total))) * LN_2
    tl.store(lse + row + i, tl.where(empty, float("-inf"), logarithm), mask=i < rows)


def forward(q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> tuple[Tensor, Tensor]:
    """``(out, lse)``; see `Kernel.forward`."""
    batch, rows, heads, _ = q.shape
    out = torch.empty(batch, rows, heads, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    tile = sizes(FORWARD, q, v)
    with launching(q):
        forward_kernel[(triton.cdiv(rows, tile.rows), heads, batch)](
            q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **arguments(q, k, v, block, tile)
        )
    return out, lse
