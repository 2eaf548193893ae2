"""A causal language model as a user would write it: plain torch, no thought of parallelism."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def rotate(x_BHLD: Tensor, position_ids_BL: Tensor) -> Tensor:
    """Rotary embedding of heads [B, H, L, D] at the given positions."""
    half = x_BHLD.shape[-1] // 2
    frequency = 100.0 ** (-torch.arange(half, device=x_BHLD.device) / half)
    angle = position_ids_BL[:, None, :, None] * frequency
    cos, sin = angle.cos().to(x_BHLD.dtype), angle.sin().to(x_BHLD.dtype)
    first, second = x_BHLD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class Attention(nn.Module):
    """Causal self-attention with fewer key and value heads than query heads."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q = nn.Linear(width, width)
        # No bias on keys: softmax does not see a constant added to a row of scores, so its gradient would be noise.
        self.k = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_dim)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor, position_ids_BL: Tensor) -> Tensor:
        batch, length, _ = x_BLC.shape
        q = self.q(x_BLC).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x_BLC).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x_BLC).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        q, k = rotate(q, position_ids_BL), rotate(k, position_ids_BL)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        return self.out(out.transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    """Attention, then an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int, kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm_attn, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, kv_heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLC: Tensor, position_ids_BL: Tensor) -> Tensor:
        x_BLC = x_BLC + self.dropout(self.attn(self.norm_attn(x_BLC), position_ids_BL))
        return x_BLC + self.dropout(self.mlp(self.norm_mlp(x_BLC)))


class CausalLM(nn.Module):
    """Returns the mean cross-entropy over the labels that are not -100; labels are already shifted."""

    def __init__(
        self,
        vocabulary: int = 31,
        width: int = 24,
        heads: int = 6,
        kv_heads: int = 2,
        depth: int = 2,
        dropout: float = 0.0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        # Random and not learned, as in random feature maps: DeepSpeed shares parameters between ranks, not buffers.
        self.register_buffer("shift", 0.1 * torch.randn(width))

    def forward(self, input_ids: Tensor, position_ids: Tensor, labels: Tensor) -> Tensor:
        x_BLC = self.embed(input_ids)
        # DeepSpeed leaves buffers in fp32 where it makes parameters bf16.
        x_BLC = x_BLC + self.shift.to(x_BLC.dtype)
        for layer in self.layers:
            if self.recompute:
                x_BLC = checkpoint(layer, x_BLC, position_ids, use_reentrant=False)
            else:
                x_BLC = layer(x_BLC, position_ids)
        logits = self.head(self.norm(x_BLC)).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
