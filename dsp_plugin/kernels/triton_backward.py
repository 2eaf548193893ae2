"""The gradients of a block's attention in two launches of Triton kernels; without atomics, so the same on every run."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsp_plugin.kernels.kernel import BlockSpec
from dsp_plugin.kernels.triton_launch import OF_KEYS, OF_QUERIES, arguments, sizes
from dsp_plugin.kernels.triton_tiles import (
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


# fmt: off
@triton.jit
def _over_keys(
    dq, queries, douts, i, row_keys, lse, delta, k, v, k_n, v_n,
    start, stop, rows, cols, left, right, scale, threshold, keep_scale,
    k_start, k_step, D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
    N: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the keys ``start .. stop`` to the gradient of M queries."""
    for first in range(start, stop, N):
        j = first + tl.arange(0, N)
        keys = tile_of(k, j, k_n, cols, D, WIDE, MASKED)
        values = tile_of(v, j, v_n, cols, DV, WIDE_V, MASKED)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * LOG2_E)
        weights = tl.exp2(scores - lse[:, None])
        if MASKED:
            seen = visible(i[:, None], j[None, :], rows, cols, left, right, LEFT, RIGHT)
            weights = tl.where(seen, weights, 0.0)
        dweights = tl.dot(douts, tl.trans(values), input_precision=PRECISION)
        if DROPOUT:
            lane = key_lane(positions(k_start, k_step, j))
            keep = kept(row_keys[:, None], lane[None, :], threshold)
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["rows", "cols", "left", "right"])
def dq_kernel(
    q, k, v, out, lse, dout, delta, dq,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    out_b, out_n, out_h, lse_b, lse_h, lse_n, dout_b, dout_n, dout_h,
    rows, cols, group, left, right, scale,
    seed: tl.int64, threshold: tl.int32, keep_scale, q_start: tl.int64, q_step: tl.int64, k_start: tl.int64,
    k_step: tl.int64, first_head: tl.int64, first_row: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    """One program: the gradient of M queries of one head, and ``delta``, the products of their outs and douts."""
    heads = tl.num_programs(1)
    # The last queries, which see most keys under a causal mask, come first.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    kv_head = head // group
    q += batch * q_b + head.to(tl.int64) * q_h
    k += batch * k_b + kv_head.to(tl.int64) * k_h
    v += batch * v_b + kv_head.to(tl.int64) * v_h
    out += batch * out_b + head.to(tl.int64) * out_h
    dout += batch * dout_b + head.to(tl.int64) * dout_h
    lse += batch * lse_b + head.to(tl.int64) * lse_h
    i = first + tl.arange(0, M)
    queries = tile_of(q, i, q_n, rows, D, WIDE, True)
    douts = tile_of(dout, i, dout_n, rows, DV, WIDE_V, True)
    outs = tile_of(out, i, out_n, rows, DV, WIDE_V, True)
    products = tl.sum(outs.to(tl.float32) * douts.to(tl.float32), 1)
    tl.store(delta + (batch * heads + head) * rows + i, products, mask=i < rows)
    logarithms = tl.load(lse + i.to(tl.int64) * lse_n, mask=i < rows, other=0.0) * LOG2_E
    row_keys = tl.zeros([M], tl.uint64)
    if DROPOUT:
        row_keys = fold(head_key(seed, first_row + batch, first_head + head), positions(q_start, q_step, i))
    start, full, partial, stop = stretches(first, tl.minimum(first + M, rows) - 1, cols, left, right, LEFT, RIGHT, N)
    found = tl.zeros([M, WIDE], tl.float32)
    if LEFT:
        found = _over_keys(
            found, queries, douts, i, row_keys, logarithms, products, k, v, k_n, v_n, start, tl.minimum(full, stop),
            rows, cols, left, right, scale, threshold, keep_scale, k_start, k_step, D, DV, WIDE, WIDE_V, N, LEFT,
            RIGHT, DROPOUT, True, PRECISION,
        )
    found = _over_keys(
        found, queries, douts, i, row_keys, logarithms, products, k, v, k_n, v_n, full, partial,
        rows, cols, left, right, scale, threshold, keep_scale, k_start, k_step, D, DV, WIDE, WIDE_V, N, LEFT,
        RIGHT, DROPOUT, False, PRECISION,
    )
    found = _over_keys(
        found, queries, douts, i, row_keys, logarithms, products, k, v, k_n, v_n, partial, stop,
        rows, cols, left, right, scale, threshold, keep_scale, k_start, k_step, D, DV, WIDE, WIDE_V, N, LEFT,
        RIGHT, DROPOUT, True, PRECISION,
    )
    dq += batch * rows * heads * D + head * D
    put_tile(dq, found * scale, i, heads * D, rows, D, WIDE)


@triton.jit
def _over_queries(
    dk, dv, keys, values, j, lane, head_state, q, dout, lse,
    delta, q_n, dout_n, lse_n, start, stop, rows, cols, left, right,
    scale, threshold, keep_scale, q_start, q_step, D: tl.constexpr, DV: tl.constexpr,
    WIDE: tl.constexpr, WIDE_V: tl.constexpr, M: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    DROPOUT: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):
    """Adds the queries ``start .. stop`` of a head to the gradients of N keys. Tiles lie transposed: ``[N, M]``."""
    for first in range(start, stop, M):
        i = first + tl.arange(0, M)
        queries = tile_of(q, i, q_n, rows, D, WIDE, MASKED)
        douts = tile_of(dout, i, dout_n, rows, DV, WIDE_V, MASKED)
        at = i.to(tl.int64)
        if MASKED:
            logarithms = tl.load(lse + at * lse_n, mask=i < rows, other=0.0) * LOG2_E
            products = tl.load(delta + at, mask=i < rows, other=0.0)
        else:
            logarithms = tl.load(lse + at * lse_n) * LOG2_E
            products = tl.load(delta + at)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2_E)
        weights = tl.exp2(scores - logarithms[None, :])
        if MASKED:
            seen = visible(i[None, :], j[:, None], rows, cols, left, right, LEFT, RIGHT)
            weights = tl.where(seen, weights, 0.0)
        dweights = tl.dot(values, tl.trans(douts), input_precision=PRECISION)
        dropped = weights
        if DROPOUT:
            row_keys = fold(head_state, positions(q_start, q_step, i))
            keep = kept(row_keys[None, :], lane[:, None], threshold)
            dropped = tl.where(keep, weights * keep_scale, 0.0)
            dweights = tl.where(keep, dweights * keep_scale, 0.0)
        dv = tl.dot(dropped.to(douts.dtype), douts, dv, input_precision=PRECISION)
        dscores = weights * (dweights - products[None, :])
        dk = tl.dot(dscores.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["rows", "cols", "left", "right"])
def dkv_kernel(
    q, k, v, lse, dout, delta, dk, dv,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    lse_b, lse_h, lse_n, dout_b, dout_n, dout_h,
    rows, cols, group, left, right, scale,
    seed: tl.int64, threshold: tl.int32, keep_scale, q_start: tl.int64, q_step: tl.int64, k_start: tl.int64,
    k_step: tl.int64, first_head: tl.int64, first_row: tl.int64,
    D: tl.constexpr, DV: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):
    """One program: the gradients of N keys and values of one kv head, over all query heads that it serves."""
    kv_heads = tl.num_programs(1)
    first = tl.program_id(0) * N
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += batch * q_b
    dout += batch * dout_b
    lse += batch * lse_b
    delta += batch * kv_heads * group * rows
    k += batch * k_b + kv_head.to(tl.int64) * k_h
    v += batch * v_b + kv_head.to(tl.int64) * v_h
    j = first + tl.arange(0, N)
    keys = tile_of(k, j, k_n, cols, D, WIDE, True)
    values = tile_of(v, j, v_n, cols, DV, WIDE_V, True)
    lane = key_lane(positions(k_start, k_step, j))
    # Key j is seen by queries j - right .. j + left.
    start, full, partial, stop = stretches(first, tl.minimum(first + N, cols) - 1, rows, right, left, RIGHT, LEFT, M)
    found_dk = tl.zeros([N, WIDE], tl.float32)
    found_dv = tl.zeros([N, WIDE_V], tl.float32)
    for served in range(group):
        far = (kv_head * group + served).to(tl.int64)
        q_head, dout_head = q + far * q_h, dout + far * dout_h
        lse_head, delta_head = lse + far * lse_h, delta + far * rows
        state = head_key(seed, first_row + batch, first_head + far)
        if RIGHT:
            found_dk, found_dv = _over_queries(
                found_dk, found_dv, keys, values, j, lane, state, q_head, dout_head, lse_head, delta_head, q_n, dout_n,
                lse_n, start, tl.minimum(full, stop), rows, cols, left, right, scale, threshold, keep_scale, q_start,
                q_step, D, DV, WIDE, WIDE_V, M, LEFT, RIGHT, DROPOUT, True, PRECISION,
            )
        found_dk, found_dv = _over_queries(
            found_dk, found_dv, keys, values, j, lane, state, q_head, dout_head, lse_head, delta_head, q_n, dout_n,
            lse_n, full, partial, rows, cols, left, right, scale, threshold, keep_scale, q_start,
            q_step, D, DV, WIDE, WIDE_V, M, LEFT, RIGHT, DROPOUT, False, PRECISION,
        )
        found_dk, found_dv = _over_queries(
            found_dk, found_dv, keys, values, j, lane, state, q_head, dout_head, lse_head, delta_head, q_n, dout_n,
            lse_n, partial, stop, rows, cols, left, right, scale, threshold, keep_scale, q_start,
            q_step, D, DV, WIDE, WIDE_V, M, LEFT, RIGHT, DROPOUT, True, PRECISION,
        )
    dk += batch * cols * kv_heads * D + kv_head * D
    dv += batch * cols * kv_heads * DV + kv_head * DV
    put_tile(dk, found_dk * scale, j, kv_heads * D, cols, D, WIDE)
    put_tile(dv, found_dv, j, kv_heads * DV, cols, DV, WIDE_V)
# fmt: on


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: BlockSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``; see `Kernel.backward`."""
    batch, rows, heads, _ = q.shape
    _, cols, kv_heads, _ = k.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device)
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    with launching(q):
        tile = sizes(OF_QUERIES, q, v)
        dq_kernel[(triton.cdiv(rows, tile.rows), heads, batch)](
            *(q, k, v, out, lse, dout, delta, dq, *inputs, *out.stride()[:3], *lse.stride(), *dout.stride()[:3]),
            **arguments(q, k, v, block, tile),
        )
        tile = sizes(OF_KEYS, q, v)
        dkv_kernel[(triton.cdiv(cols, tile.cols), kv_heads, batch)](
            *(q, k, v, lse, dout, delta, dk, dv, *inputs, *lse.stride(), *dout.stride()[:3]),
            **arguments(q, k, v, block, tile),
        )
    return dq, dk, dv
