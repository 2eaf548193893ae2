"""The blocks of `dsp_plugin.models.video_dit.VideoDiT` on Megatron-core's tensor-parallel layers.

The same mathematics and the same names of parameters: projections are column- and row-parallel, heads are spread over
tensor-parallel ranks, and the adaptive norms' projections are column-parallel with their outputs gathered. With
``--sequence-parallel``, norms, modulations and residuals work on this rank's part of the tokens.

Shape suffixes are those of `dsp_plugin.models.video_dit`, with tokens before the batch, as Megatron has them: N is this
rank's tokens, frame by frame; M condition tokens.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dsp_plugin.models.video_dit import plain_norm, rotate
from dsp_plugin.patches.megatron.state_passing import recomputed
from dsp_plugin.patches.megatron.video_tokens import Dim, Tokens


def column_linear(config: Any, inputs: int, outputs: int, *, bias: bool = True) -> nn.Module:
    """Megatron's `ColumnParallelLinear`: with ``sequence_parallel`` it gathers the tokens that it takes."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    linear: nn.Module = ColumnParallelLinear(
        inputs, outputs, config=config, init_method=config.init_method, bias=bias, gather_output=False
    )
    return linear


def row_linear(config: Any, inputs: int, outputs: int) -> nn.Module:
    """Megatron's `RowParallelLinear`: with ``sequence_parallel`` it scatters the tokens that it returns."""
    from megatron.core.tensor_parallel import RowParallelLinear

    linear: nn.Module = RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.output_layer_init_method,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    return linear


def on_whole(config: Any) -> Any:
    """The configuration for layers whose input is whole on every tensor-parallel rank: no tokens to gather."""
    config = copy.copy(config)
    config.sequence_parallel = False
    return config


def mark_partial(config: Any, module: nn.Module) -> nn.Module:
    """Marks the parameters of a module that sees this rank's part of the tokens: Megatron adds up their gradients."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return module


@dataclass(frozen=True)
class Place:
    """Where a block runs.

    Attributes:
        tokens: of this rank.
        sharded: the dim that is sharded there; the block computes along the other.
        rope: table of rotary positions along that other dim, ``[L, D]`` in the order of the gathered tokens; None with
            sinusoidal positions.
    """

    tokens: Tokens
    sharded: Dim
    rope: Tensor | None


class SelfAttention(nn.Module):
    """Attention along frames or along patches, whichever is not sharded; this rank's heads."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.config, self.head_dim = config, width // heads
        self.qkv = column_linear(config, width, 3 * width, bias=False)
        self.out = row_linear(config, width, width)

    def forward(self, x_NBC: Tensor, place: Place) -> Tensor:
        """Returns [N, B, C]."""
        frames = len(place.tokens.gathered_frames(place.sharded))
        batched = "(t b) h s d" if place.sharded == "t" else "(s b) h t d"
        qkv = self.qkv(x_NBC)[0]
        q, k, v = rearrange(qkv, f"(t s) b (h qkv d) -> qkv {batched}", t=frames, qkv=3, d=self.head_dim)
        if place.rope is not None:
            q, k = rotate(q, place.rope), rotate(k, place.rope)
        out = recomputed(self.config, self)(F.scaled_dot_product_attention, q, k, v)
        y: Tensor = self.out(rearrange(out, f"{batched} -> (t s) b (h d)", b=x_NBC.shape[1]))[0]
        return y


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
        # The keys are places in the `nn.Sequential` of `VideoDiT`, so that parameters have its names.
        self.mlp = nn.ModuleDict(
            {
                "0": column_linear(config, width, config.ffn_hidden_size),
                "2": row_linear(config, config.ffn_hidden_size, width),
            }
        )

    def forward(self, x_NBC: Tensor, cond_1BC: Tensor, text_MBC: Tensor, place: Place) -> Tensor:
        """Returns [N, B, C]."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.modulation(cond_1BC)
        x_NBC = x_NBC + gate_attn * self.attn(self.norm_attn(x_NBC) * (1 + scale_attn) + shift_attn, place)
        x_NBC = x_NBC + self.cross(self.norm_cross(x_NBC), text_MBC)
        hidden = self.mlp["0"](self.norm_mlp(x_NBC) * (1 + scale_mlp) + shift_mlp)[0]
        return x_NBC + gate_mlp * self.mlp["2"](F.gelu(hidden, approximate="tanh"))[0]


class SpaceTimeLayer(nn.Module):
    """A space block, then a time block, each behind the switch that it needs."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.space, self.time = Block(config), Block(config)

    def forward(
        self, x_NBC: Tensor, cond_1BC: Tensor, text_MBC: Tensor, arrives: Dim, space: Place, time: Place
    ) -> Tensor:
        """One layer.

        Args:
            x_NBC: video tokens, with ``arrives`` sharded.
            cond_1BC, text_MBC: the condition, whole on every rank.
            space, time: where its blocks run.

        Returns:
            ``[N, B, C]`` with ``time.sharded`` sharded.
        """

        def run(x: Tensor, cond: Tensor, text: Tensor) -> Tensor:
            x = self.space(space.tokens.switch(x, arrives, space.sharded), cond, text, space)
            y: Tensor = self.time(time.tokens.switch(x, space.sharded, time.sharded), cond, text, time)
            return y

        if self.config.recompute_granularity == "full" and self.training:
            from megatron.core import tensor_parallel

            out: Tensor = tensor_parallel.checkpoint(run, False, x_NBC, cond_1BC, text_MBC)
            return out
        return run(x_NBC, cond_1BC, text_MBC)


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
