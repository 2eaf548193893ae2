"""The blocks of `dsp_plugin.models.video_dit.VideoDiT` on Megatron-core's tensor-parallel layers.

The same mathematics and the same names of parameters, as in token_layers.py; the adaptive norms' projections are
column-parallel with their outputs gathered.

Shape suffixes are those of `dsp_plugin.models.video_dit`, with tokens before the batch, as Megatron has them: N is this
rank's tokens, frame by frame; M condition tokens.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dsp_plugin.models.video_dit import plain_norm
from dsp_plugin.patches.megatron.models.token_layers import (
    Mlp,
    Place,
    SelfAttention,
    TokenLayer,
    column_linear,
    mark_partial,
    on_whole,
    row_linear,
)
from dsp_plugin.patches.megatron.state_passing import recomputed


class CrossAttention(nn.Module):
    """Attention of every video token to the condition tokens, which are whole on every rank; this rank's heads."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.config, self.head_dim = config, width // heads
        self.q = column_linear(config, width, width, bias=False)
        self.kv = column_linear(on_whole(config), width, 2 * width, bias=False)
        self.out = row_linear(config, width, width)

    def forward(self, x_NBC: Tensor, text_MBC: Tensor) -> Tensor:
        """Returns [N, B, C]."""
        q = rearrange(self.q(x_NBC)[0], "n b (h d) -> b h n d", d=self.head_dim)
        k, v = rearrange(self.kv(text_MBC)[0], "m b (h kv d) -> kv b h m d", kv=2, d=self.head_dim)
        out = recomputed(self.config, self)(F.scaled_dot_product_attention, q, k, v)
        y: Tensor = self.out(rearrange(out, "b h n d -> n b (h d)"))[0]
        return y


class Modulation(nn.Module):
    """The condition vector to ``parts`` vectors that broadcast over tokens; each rank computes its share of them."""

    def __init__(self, config: Any, parts: int) -> None:
        super().__init__()
        self.parts, self.sequence_parallel = parts, config.sequence_parallel
        self.linear = column_linear(on_whole(config), config.hidden_size, parts * config.hidden_size)

    def forward(self, cond_1BC: Tensor) -> Tensor:
        """Returns [parts, 1, B, C]."""
        from megatron.core.tensor_parallel import mappings

        share = self.linear(F.silu(cond_1BC))[0]
        if self.sequence_parallel:
            # Ranks apply the vectors to different tokens: their gradients are added up on the way back.
            whole = mappings.all_gather_last_dim_from_tensor_parallel_region(share)
        else:
            whole = mappings.gather_from_tensor_model_parallel_region(share)
        return rearrange(whole, "1 b (parts c) -> parts 1 b c", parts=self.parts)


class Block(nn.Module):
    """Self-attention along the dim that is not sharded, cross-attention to the condition, MLP."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.modulation = Modulation(config, parts=6)
        self.norm_attn, self.norm_mlp = plain_norm(width), plain_norm(width)
        self.norm_cross = mark_partial(config, nn.LayerNorm(width))
        self.attn = SelfAttention(config)
        self.cross = CrossAttention(config)
        self.mlp = Mlp(config)

    def forward(self, x_NBC: Tensor, place: Place, cond_1BC: Tensor, text_MBC: Tensor) -> Tensor:
        """Returns [N, B, C]."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.modulation(cond_1BC)
        x_NBC = x_NBC + gate_attn * self.attn(self.norm_attn(x_NBC) * (1 + scale_attn) + shift_attn, place)
        x_NBC = x_NBC + self.cross(self.norm_cross(x_NBC), text_MBC)
        return x_NBC + gate_mlp * self.mlp(self.norm_mlp(x_NBC) * (1 + scale_mlp) + shift_mlp)


def space_time_layer(config: Any) -> TokenLayer:
    """A space block, then a time block; they take the condition, ``cond_1BC`` and ``text_MBC``, besides."""
    return TokenLayer(config, {"space": Block(config), "time": Block(config)})


class FinalLayer(nn.Module):
    """Adaptive norm, then each token back to its patch's pixels."""

    def __init__(self, config: Any, pixels: int) -> None:
        super().__init__()
        self.modulation = Modulation(config, parts=2)
        self.norm = plain_norm(config.hidden_size)
        self.linear = mark_partial(config, nn.Linear(config.hidden_size, pixels))

    def forward(self, x_NBC: Tensor, cond_1BC: Tensor) -> Tensor:
        """Returns [N, B, pixels in a patch]."""
        shift, scale = self.modulation(cond_1BC)
        y: Tensor = self.linear(self.norm(x_NBC) * (1 + scale) + shift)
        return y
