"""Online-softmax merge of attention results over disjoint sets of keys (Milakov & Gimelshein, arXiv 1805.02867)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsp_plugin.kernels import triton_merge


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs: the type of every lse and of every sum over blocks."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_state(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result of attending to no key: ``out = 0`` ``[B, n, H, Dv]``, ``lse = -inf`` ``[B, H, n]``, to merge into.

    Args:
        q: ``[B, n, H, D]``, whose dtype decides the accumulation dtype.
        v: ``[B, m, K, Dv]``.
    """
    batch, n, heads, _ = q.shape
    dtype = accumulation_dtype(q.dtype)
    out = torch.zeros(batch, n, heads, v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full((batch, heads, n), -torch.inf, dtype=dtype, device=q.device)
    return out, lse


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor, *, may_be_empty: bool = True) -> None:
    """Merges a block's result into an accumulated one, in place; both may be views.

    Args:
        out, lse: the accumulated result, ``[B, n, H, Dv]`` and ``[B, H, n]`` in the accumulation dtype.
        block_out, block_lse: the result for other keys, same shapes; either may have a lower precision.
        may_be_empty: whether a query may have seen no key on either side, which leaves ``out`` 0 and ``lse`` -inf.
            Where the block is known to have a key for every query, it costs a launch less to say so.
    """
    if triton_merge.serves(out, lse):
        triton_merge.merge_(out, lse, block_out, block_lse)
        return
    block_lse = block_lse.to(lse.dtype)
    # For -inf on both sides their difference would be no number. Against any finite lse, 0 is what the block weighs.
    so_far = lse.clamp(min=torch.finfo(lse.dtype).min) if may_be_empty else lse
    weight = torch.sub(block_lse, so_far).sigmoid_()
    out.lerp_(block_out.to(out.dtype), weight.transpose(1, 2)[..., None])
    torch.logaddexp(lse, block_lse, out=lse)
