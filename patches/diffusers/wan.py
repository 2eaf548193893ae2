"""Wan 2.1 and 2.2 (arXiv 2503.20314) in diffusers: every token of the video attends to every other.

Shape suffixes: B batch, L tokens = (T frames) * (height) * (width) in patches, C model width, D head dim,
P = channels * pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dsp_plugin.patches.diffusers.kinds import sizes_of
from dsp_plugin.plans.plan import Plan
from dsp_plugin.plans.stage import Stage


def _times_are_of_videos(call: Mapping[str, Any]) -> bool:
    return bool(call["timestep"].ndim == 1)


def plan(module: nn.Module) -> Plan:
    """The plan of a `WanTransformer3DModel`.

    No dim is free of attention, so method ``usp``, ``ulysses`` or ``ring`` runs inside every block, on its
    self-attention. Modulation [B, 6, C] is for all tokens alike, [B, L, 6, C] (time steps per token, Wan 2.2) follows
    them, as do the rotary tables, two of [1, L, 1, D]. Text, and the image of image-to-video, stay whole.

    Tokens are gathered when they are pixels, P of each. With time steps per token they are gathered behind the last
    block: what modulates them there, outside of any module, is whole.

    Raises:
        SequenceParallelConfigError: ``module`` is of another class.
    """
    heads, pixels = sizes_of(module, "WanTransformer3DModel", "dsp_plugin.patches.diffusers.wan:plan")
    return Plan(
        tokens="b l c",
        sizes={"p": pixels},
        stages=(
            Stage(
                "blocks.*",
                ("l",),
                follows={"temb": "b 6 c | b l 6 c", "rotary_emb": "1 l 1 d"},
                attention="attn1",
                heads=heads,
            ),
            Stage("proj_out", (), gives="b l p", when=_times_are_of_videos),
        ),
    )


def subject(
    frames: int = 5,
    height: int = 16,
    width: int = 16,
    patch: int = 2,
    channels: int = 4,
    heads: int = 4,
    head_dim: int = 16,
    depth: int = 2,
    batch: int = 1,
    caption: int = 8,
    caption_channels: int = 32,
) -> tuple[nn.Module, dict[str, Any]]:
    """A `WanTransformer3DModel` with random weights, and the arguments of one call.

    Args:
        frames: of the latent. height, width: of a latent frame, in pixels. patch: side of a patch, in pixels.
        channels: of the latent. heads: of attention. head_dim: features of each. depth: blocks.
        batch: videos. caption: text tokens. caption_channels: features of each.
    """
    from diffusers import WanTransformer3DModel

    model: Any = WanTransformer3DModel(
        patch_size=(1, patch, patch),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        out_channels=channels,
        text_dim=caption_channels,
        freq_dim=32,
        ffn_dim=4 * heads * head_dim,
        num_layers=depth,
        rope_max_seq_len=max(frames, height // patch, width // patch),
    )
    return model, {
        "hidden_states": torch.randn(batch, channels, frames, height, width),
        "timestep": torch.randint(1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, caption, caption_channels),
    }
