"""Wrong calls of attention and of DSP's switches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mistakes import BATCH, HEAD_DIM, HEADS, LENGTH, Groups, Mistake, unsupported, wrong
from torch import Tensor

from dsp_plugin import Layout, MaskSpec
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import dsp, ulysses
from dsp_plugin.methods.method import Where


def attend(
    groups: Groups,
    *,
    tokens: int | None = None,
    k_tokens: int | None = None,
    v_tokens: int | None = None,
    heads: int = HEADS,
    kv_heads: int = HEADS,
    k_dim: int = HEAD_DIM,
    k_batch: int = BATCH,
    v_dtype: torch.dtype = torch.float32,
    dims: int = 4,
    **settings: Any,
) -> None:
    layout = Layout("contiguous", LENGTH, groups.sp.size)
    n = layout.sizes[groups.sp.rank] if tokens is None else tokens
    q = torch.zeros(BATCH, n, heads, HEAD_DIM)
    k = torch.zeros(k_batch, n if k_tokens is None else k_tokens, kv_heads, k_dim)
    v = torch.zeros(k_batch, k.shape[1] if v_tokens is None else v_tokens, kv_heads, HEAD_DIM, dtype=v_dtype)
    if dims == 3:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    ulysses.attention(q, k, v, what=AttentionSpec(**settings), where=Where(groups, layout))


def local_activation(groups: Groups, dim: int = 1) -> Tensor:
    return Layout("contiguous", LENGTH, groups.sp.size).shard(
        torch.zeros(BATCH, LENGTH, LENGTH, 4), dim, groups.sp.rank
    )


def switch(groups: Groups, from_dim: int, to_dim: int, length: int = LENGTH) -> None:
    dsp.switch(local_activation(groups), from_dim, to_dim, length=length, groups=groups)


def switched(*args: int, **how: Any) -> Callable[..., None]:
    return lambda groups: switch(groups, *args, **how)


CALLS: dict[str, Mistake] = {
    "unsharded tokens": wrong(attend, "sequence length=8", "8 tokens in the contiguous layout", "rank", tokens=LENGTH),
    "too few tokens": wrong(attend, "sequence length=1", "holds", "same layout and length", tokens=1),
    "cross-attention": wrong(attend, "attention inputs", "k (2, 30, 4, 8)", "call it directly", k_tokens=30),
    "values of other tokens": wrong(attend, "attention inputs", "v (2, 9, 4, 8)", "equal B, n and K", v_tokens=9),
    "other batch of keys": wrong(attend, "attention inputs", "k (3,", "equal B", k_batch=3),
    "other head dim of keys": wrong(attend, "attention inputs", "4, 16)", "q [B, n, H, D], k [B, n, K, D]", k_dim=16),
    "tensors without heads": wrong(attend, "attention inputs", "expected q [B, n, H, D]", dims=3),
    "mixed dtypes": wrong(attend, "v torch.bfloat16", "share a dtype", "Cast them", v_dtype=torch.bfloat16),
    "fewer heads than ranks": wrong(attend, "heads=1 < ulysses_size=", "set a size of 1 or less", heads=1, kv_heads=1),
    "kv heads that do not divide": wrong(attend, "heads=4 is not a multiple of kv_heads=3", "fix the", kv_heads=3),
    "borders short of the end": wrong(
        attend, "cu_seqlens=(0, 3, 7)", "last border is 7", "8 tokens", mask=MaskSpec(cu_seqlens=(0, 3, 7))
    ),
    "borders of a shard": wrong(attend, "cu_seqlens=(0, 4)", "not of a shard", mask=MaskSpec(cu_seqlens=(0, 4))),
    "dropout without a seed": wrong(attend, "dropout_seed", "dropout_p=0.1", "same on every rank", dropout_p=0.1),
    "dropout of 1.5": wrong(attend, "dropout_p=1.5", "is a number in [0, 1)", dropout_p=1.5, dropout_seed=1),
    "unknown kernel": wrong(attend, "kernel='flash'", "kernels are auto", kernel="flash"),
    "kernel of another device": unsupported(attend, "kernel='cuda_flash'", "device cpu", "'auto'", kernel="cuda_flash"),
    "switch to the same dim": wrong(switched(1, 1), "switch='1 -> 1'", "two different dims", "Drop the switch"),
    "switch to the same dim from behind": wrong(switched(1, -3), "switch='1 -> 1'", "two different dims"),
    "switch of a wrong length": wrong(
        switched(1, 2, length=80), "length=80", "of 80 entries", "dim that is sharded now"
    ),
    "switch from the whole dim": wrong(switched(2, 1), "length=8", "dim 2 of a tensor", "not 8"),
    "switch to no dim": wrong(switched(1, 4), "switch to_dim=4", "dims 0 to 3", "Count dims"),
    "gather of a wrong length": wrong(
        lambda groups: dsp.gather(local_activation(groups), 1, length=99, groups=groups), "length=99", "of 99 entries"
    ),
    "gather of no dim": wrong(
        lambda groups: dsp.gather(local_activation(groups), -5, length=LENGTH, groups=groups), "gather dim=-5", "0 to 3"
    ),
    "split of no dim": wrong(
        lambda groups: dsp.split(torch.zeros(4, 4), 2, groups=groups), "split dim=2", "dims 0 to 1", "Count dims"
    ),
}
