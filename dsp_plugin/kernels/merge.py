"""Online-softmax merge of attention results over disjoint sets of keys (Milakov & Gimelshein, arXiv 1805.02867)."""

from __future__ import annotations

import torch
from torch import Tensor


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


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merges a block's result into an accumulated one, in place; both may be views.

    Args:
        out, lse: the accumulated result, ``[B, n, H, Dv]`` and ``[B, H, n]`` in the accumulation dtype.
        block_out, block_lse: the result for other keys, same shapes; ``block_out`` may have a lower precision.
    """
    total = torch.logaddexp(lse, block_lse)
    # Rows that have seen no key on either side keep lse = -inf; 0 stands in so that their weights are exp(-inf) = 0.
    finite = total.masked_fill(total == -torch.inf, 0.0)
    weight = (lse - finite).exp().transpose(1, 2)[..., None]
    block_weight = (block_lse - finite).exp().transpose(1, 2)[..., None]
    out.mul_(weight).add_(block_out * block_weight)
    lse.copy_(total)
