"""Online-softmax merge in one launch (Milakov & Gimelshein, arXiv 1805.02867)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dsp_plugin.kernels.triton_usable import launching, width

_ELEMENTS = 4096


# fmt: off
@triton.jit(do_not_specialize=["rows"])
def merge_kernel(
    out, lse, block_out, block_lse, out_b, out_n, out_h, lse_b, lse_h, lse_n, block_out_b, block_out_n, block_out_h,
    block_lse_b, block_lse_h, block_lse_n, batch, rows, heads, DV: tl.constexpr, WIDE: tl.constexpr, R: tl.constexpr,
):
    """One program: R rows, of which a head's is one."""
    index = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    inside = index < batch.to(tl.int64) * rows * heads
    head, token = index % heads, index // heads
    i, b = token % rows, token // rows
    columns = tl.arange(0, WIDE)
    mask = inside[:, None] & (columns < DV)[None, :]

    lse += b * lse_b + head * lse_h + i * lse_n
    mine = tl.load(lse, mask=inside, other=0.0)
    other = tl.load(block_lse + b * block_lse_b + head * block_lse_h + i * block_lse_n, mask=inside, other=0.0)
    other = other.to(tl.float32)
    highest = tl.maximum(mine, other)
    # Of rows that have seen no key on either side, the weights are exp(-inf) = 0.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    weight, block_weight = tl.exp(mine - shift), tl.exp(other - shift)
    total = weight + block_weight
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(lse, tl.where(empty, float("-inf"), shift + tl.log(total)), mask=inside)

    at = out + (b * out_b + i * out_n + head * out_h)[:, None] + columns[None, :]
    block_at = block_out + (b * block_out_b + i * block_out_n + head * block_out_h)[:, None] + columns[None, :]
    x = tl.load(at, mask=mask, other=0.0)
    y = tl.load(block_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, x * (weight / total)[:, None] + y * (block_weight / total)[:, None], mask=mask)
# fmt: on


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """In place; out and block_out ``[B, n, H, Dv]`` are dense in Dv, lse and block_lse ``[B, H, n]``."""
    batch, rows, heads, dim = out.shape
    wide = width(dim)
    tile = max(1, _ELEMENTS // wide)
    if not out.numel():
        return
    with launching(out):
        merge_kernel[(triton.cdiv(batch * rows * heads, tile),)](
            *(out, lse, block_out, block_lse, *out.stride()[:3], *lse.stride(), *block_out.stride()[:3]),
            *(*block_lse.stride(), batch, rows, heads, dim, wide, tile),
            num_warps=4,
        )
