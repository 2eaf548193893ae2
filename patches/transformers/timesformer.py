"""TimeSformer (arXiv 2102.05095): divided space-time attention around one class token, by a plan.

The encoder holds tokens ``[cls, (s t)]``, t fastest. Temporal attention treats patches as batch; spatial attention
treats frames as batch and sees a copy of the class token in every frame, of which the layer then takes the mean.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.plans.plan import Plan
from dsp_plugin.plans.stage import Region, Stage


def plan(module: nn.Module) -> Plan:
    """The plan of a `TimesformerModel`, or of a module that holds one, such as `TimesformerForVideoClassification`.

    The layer folds patches into rows of a width that its config tells, and needs all frames of each: so patches are
    sharded throughout, as columns of one patch, but for spatial attention, which switches to frames and back. Only
    there does the class token have to be cut, to the copies of this rank's frames.

    Raises:
        SequenceParallelConfigError: there is no `TimesformerModel` in the module.
        UnsupportedError: it attends otherwise than divided over space and time.
    """
    for name, part in module.named_modules():
        if type(part).__name__ == "TimesformerModel":
            config: Any = part.config
            if config.attention_type != "divided_space_time":
                raise UnsupportedError(
                    setting="attention_type",
                    value=config.attention_type,
                    why="its attention is written out, so no attention method can stand in for it",
                    remedy='build the model with attention_type="divided_space_time"',
                )
            prefix = f"{name}." if name else ""
            return Plan(
                tokens="b s t c",
                stages=(
                    Stage(f"{prefix}encoder.layer.*.temporal_attention", ("t",), layout="(b s) t c"),
                    Stage(f"{prefix}encoder.layer.*.attention", ("s",), layout="(b t) 1+s c"),
                ),
                order="layers",
                sizes={"t": config.num_frames},
                overrides={f"{prefix}config.image_size": config.patch_size},
                between="s",
                region=Region(f"{prefix}encoder", layout="b 1+(s t) c"),
            )
    raise SequenceParallelConfigError(
        setting="plan",
        value="dsp_plugin.patches.transformers.timesformer:plan",
        why=f"{type(module).__name__} has no part of class TimesformerModel",
        remedy="name the plan of the model that is trained",
    )


def subject(
    frames: int = 8,
    image: int = 224,
    patch: int = 16,
    hidden: int = 768,
    heads: int = 12,
    depth: int = 12,
    batch: int = 1,
    labels: int = 400,
) -> tuple[nn.Module, dict[str, Any]]:
    """`TimesformerForVideoClassification` with random weights, and one batch for it.

    Args:
        frames: T. image: side of a frame, in pixels. patch: side of a patch, in pixels.
        hidden: model width. heads: of attention. depth: layers. batch: videos. labels: classes.

    Returns:
        The model, and the arguments of its forward pass.
    """
    import torch
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    config = TimesformerConfig(
        image_size=image,
        patch_size=patch,
        num_frames=frames,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_hidden_layers=depth,
        intermediate_size=4 * hidden,
    )
    config.num_labels = labels
    video = torch.randn(batch, frames, config.num_channels, image, image)
    return TimesformerForVideoClassification(config), {
        "pixel_values": video,
        "labels": torch.randint(labels, (batch,)),
    }
