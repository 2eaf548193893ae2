"""The fp64 dense oracle, written on its own so that it can judge the fast kernels, and its kernel in the table."""

from __future__ import annotations

import torch
from torch import Tensor

from dsp_plugin.kernels.dropout import Dropout
from dsp_plugin.kernels.kernel import BlockSpec, Kernel
from dsp_plugin.kernels.merge import accumulation_dtype
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.mask import MaskSpec


def dense_mask(mask: MaskSpec, q_positions: Tensor, k_positions: Tensor) -> Tensor:
    """bool ``[n, m]`` from int64 global positions ``[n]`` and ``[m]``, straight from the definition of `MaskSpec`."""
    i, j = q_positions[:, None], k_positions[None, :]
    seen = torch.ones(len(q_positions), len(k_positions), dtype=torch.bool, device=q_positions.device)
    if mask.causal:
        seen = seen & (j <= i)
    if mask.window is not None:
        left, right = mask.window
        if left is not None:
            seen = seen & (j >= i - left)
        if right is not None:
            seen = seen & (j <= i + right)
    if mask.cu_seqlens is not None:
        borders = torch.tensor(mask.cu_seqlens, device=q_positions.device)
        seen = seen & (torch.bucketize(i, borders, right=True) == torch.bucketize(j, borders, right=True))
    return seen


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: MaskSpec,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    head_offset: int = 0,
    q_per_kv: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention in fp64 with plain, dense torch operations; autograd differentiates it.

    Args:
        q: ``[B, Lq, H, D]``; k: ``[B, Lk, K, D]``; v: ``[B, Lk, K, Dv]``. Positions start at 0 on both sides.
        mask: which keys a query sees.
        scale: factor on the scores, ``D ** -0.5`` if None.
        dropout_p, dropout_seed, head_offset: see `dsp_plugin.kernels.dropout`.
        q_per_kv: how many consecutive query heads each kv head serves; ``H / K`` each if None.

    Returns:
        out ``[B, Lq, H, Dv]`` and lse ``[B, H, Lq]``, both fp64. A row that sees no key has out 0, lse -inf and
        gradient 0.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    served = q_per_kv if q_per_kv is not None else (heads // max(kv_heads, 1),) * kv_heads
    kv_of_head = torch.tensor([j for j, count in enumerate(served) for _ in range(count)], device=q.device).long()
    q, k, v = q.double(), k.double()[:, :, kv_of_head], v.double()[:, :, kv_of_head]
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    q_positions = torch.arange(q.shape[1], device=q.device)
    k_positions = torch.arange(k.shape[1], device=q.device)
    seen = dense_mask(mask, q_positions, k_positions)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    shape = scores.shape[:-1]
    if k.shape[1] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), scores.new_full(shape, -torch.inf)
    highest = scores.detach().masked_fill(~seen, -torch.inf).amax(-1)
    highest = torch.where(seen.any(-1), highest, torch.zeros_like(highest))
    # Masked scores are replaced before exp so that no inf enters the gradient.
    weights = torch.where(seen, torch.where(seen, scores - highest[..., None], 0.0).exp(), 0.0)
    total = weights.sum(-1)
    alive = total > 0
    safe = torch.where(alive, total, 1.0)
    lse = torch.where(alive, highest + safe.log(), -torch.inf)
    probabilities = weights / safe[..., None]
    if dropout_p > 0.0:
        assert dropout_seed is not None
        positions = range(q.shape[1]), range(k.shape[1])
        keep = Dropout(dropout_p, dropout_seed, *positions, head_offset).keep(q.shape[0], heads, q.device)
        probabilities = probabilities * keep / (1.0 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", probabilities, v), lse


class Reference(Kernel):
    """Dense fp64 on any device: quadratic memory, for checking other kernels and methods."""

    name = "reference"

    def available(self) -> tuple[bool, str]:
        return True, "dense fp64; quadratic memory, for verification"

    def version(self) -> str | None:
        return torch.__version__

    def supports(
        self, dtype: torch.dtype, device: torch.device, head_dim: int, v_head_dim: int, spec: AttentionSpec
    ) -> str | None:
        return None if device.type != "mps" else "fp64 does not exist on mps devices"

    def lse_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return accumulation_dtype(dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> tuple[Tensor, Tensor]:
        scores, _, values = _scores(q, k, v, block)
        lse = scores.logsumexp(-1)
        probabilities = (scores - lse[..., None]).exp()
        if block.dropout is not None:
            probabilities = probabilities * block.dropout.keep(q.shape[0], q.shape[2], q.device) * block.dropout.scale
        out = torch.einsum("bhij,bjhd->bihd", probabilities, values)
        return out.to(self.result_dtype(q.dtype)), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        block: BlockSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scores, keys, values = _scores(q, k, v, block)
        probabilities = (scores - lse.double()[..., None]).exp()
        dprobabilities = torch.einsum("bihd,bjhd->bhij", dout.double(), values)
        dropped = probabilities
        if block.dropout is not None:
            factor = block.dropout.keep(q.shape[0], q.shape[2], q.device) * block.dropout.scale
            dropped, dprobabilities = probabilities * factor, dprobabilities * factor
        delta = torch.einsum("bihd,bihd->bhi", dout.double(), out.double())
        dscores = probabilities * (dprobabilities - delta[..., None]) * block.scale
        dq = torch.einsum("bhij,bjhd->bihd", dscores, keys)
        dk = torch.einsum("bhij,bihd->bjhd", dscores, q.double())
        dv = torch.einsum("bhij,bihd->bjhd", dropped, dout.double())
        groups = (k.shape[2], q.shape[2] // k.shape[2])
        dk, dv = dk.unflatten(2, groups).sum(3), dv.unflatten(2, groups).sum(3)
        dtype = self.result_dtype(q.dtype)
        return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _scores(q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Masked scores ``[B, H, n, m]``, and k and v with a head per query head; fp64."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.double().repeat_interleave(group, 2) for x in (k, v))
    i = torch.arange(q.shape[1], device=q.device)
    seen = dense_mask(MaskSpec(), i, torch.arange(k.shape[1], device=q.device))
    distance = torch.arange(k.shape[1], device=q.device)[None, :] - i[:, None]
    left, right = block.band
    seen = seen & (distance >= -left) if left is not None else seen
    seen = seen & (distance <= right) if right is not None else seen
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), keys) * block.scale
    return scores.masked_fill(~seen, -torch.inf), keys, values
