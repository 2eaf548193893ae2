"""Latte (arXiv 2401.03048) in diffusers: every frame attends within itself, then every patch along time.

Shape suffixes: B batch, T frames, S patches in one frame, C model width, M text tokens, E = 6 C,
P = channels * pixels of a patch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dsp_plugin.patches.diffusers.kinds import sizes_of
from dsp_plugin.plans.plan import Plan
from dsp_plugin.plans.stage import Stage


def plan(module: nn.Module) -> Plan:
    """The plan of a `LatteTransformer3DModel`.

    Space blocks take tokens [B * T, S, C], time blocks [B * S, T, C]; in front of the first time block the positions of
    the frames are added. Text and time steps come to the blocks repeated for every frame or patch. So must a text mask
    that callers pass, [B * T, M] or [B * T, 1, M]: diffusers itself fails on one row per video.

    Behind the last block a modulation [B * T, 1, C], whole on every rank, meets the tokens between two modules, so from
    `norm_out` on all frames have to be there. Tokens are gathered when they are pixels.

    Raises:
        SequenceParallelConfigError: ``module`` is of another class.
    """
    heads, pixels = sizes_of(module, "LatteTransformer3DModel", "dsp_plugin.patches.diffusers.latte:plan")
    text: dict[int | str, str] = {
        "encoder_hidden_states": "(b t) m c",
        "encoder_attention_mask": "(b t) m | (b t) 1 m",
    }
    return Plan(
        tokens="b t s c",
        stages=(
            Stage(
                "transformer_blocks.*",
                ("s",),
                layout="(b t) s c",
                follows={**text, "timestep": "(b t) e"},
                attention="attn1",
                heads=heads,
            ),
            Stage(
                "temporal_transformer_blocks.*",
                ("t",),
                layout="(b s) t c",
                follows={"timestep": "(b s) e"},
                attention="attn1",
                heads=heads,
                when="enable_temporal_attentions",
            ),
            Stage("norm_out", ("t",), layout="(b t) s c"),
            Stage("proj_out", (), layout="(b t) s c", gives="(b t) s p"),
        ),
        # Registered as two lists, run in turns.
        order="layers",
        inputs={"hidden_states": "b _ t _ _"},
        sizes={"p": pixels},
        buffers={"temp_pos_embed": "1 t c"},
    )


def subject(
    frames: int = 16,
    side: int = 16,
    patch: int = 2,
    channels: int = 4,
    heads: int = 4,
    head_dim: int = 16,
    depth: int = 2,
    batch: int = 1,
    caption: int = 8,
    caption_channels: int = 32,
) -> tuple[nn.Module, dict[str, Any]]:
    """A `LatteTransformer3DModel` with random weights, and the arguments of one call.

    Args:
        frames: T. side: of a latent frame, in pixels. patch: side of a patch, in pixels. channels: of the latent.
        heads: of attention. head_dim: features of each. depth: pairs of a space block and a time block.
        batch: videos. caption: text tokens. caption_channels: features of each.
    """
    from diffusers import LatteTransformer3DModel

    width = heads * head_dim
    model: Any = LatteTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=channels,
        num_layers=depth,
        cross_attention_dim=width,
        attention_bias=True,
        sample_size=side,
        patch_size=patch,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=caption_channels,
        video_length=frames,
    )
    return model, {
        "hidden_states": torch.randn(batch, channels, frames, side, side),
        "timestep": torch.randint(1000, (batch,)),
        "encoder_hidden_states": torch.randn(batch, caption, caption_channels),
    }
