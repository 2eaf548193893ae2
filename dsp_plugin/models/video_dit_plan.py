"""Where `VideoDiT` mixes tokens: all that is needed to shard it."""

from __future__ import annotations

from torch import nn

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.plans.plan import Plan
from dsp_plugin.plans.stage import Stage


def plan(module: nn.Module) -> Plan:
    """The plan of a `VideoDiT`, or of a module that holds one, such as a training objective.

    A space block treats frames as batch, a time block treats patches as batch; the MLP and the cross-attention treat
    every token alike. The rotary tables run along the dim that their block computes along.

    Tokens are split while they are pixels, and gathered when they are again. Sinusoidal positions are added to whole
    tokens, so with them the embedding stays in front of the first stage.

    Raises:
        SequenceParallelConfigError: there is no `VideoDiT` in the module.
    """
    # By name, not by class: a script that loads the model's file on its own has another class object.
    for name, part in module.named_modules():
        if type(part).__name__ == "VideoDiT":
            prefix = f"{name}." if name else ""
            heads, final = part.get_submodule("blocks.0.space.attn").heads, part.get_submodule("final.linear")
            assert isinstance(heads, int)
            assert isinstance(final, nn.Linear)
            embed = Stage(f"{prefix}patch_embed", (), takes="b t s p")
            return Plan(
                tokens="b t s c",
                sizes={"c": final.in_features, "p": final.out_features},
                stages=(
                    *([embed] if part.positions == "rotary" else []),
                    Stage(f"{prefix}blocks.*.space", ("s",), follows={"rope": "s d"}, attention="attn", heads=heads),
                    Stage(f"{prefix}blocks.*.time", ("t",), follows={"rope": "t d"}, attention="attn", heads=heads),
                    Stage(f"{prefix}final", (), gives="b t s p"),
                ),
            )
    raise SequenceParallelConfigError(
        setting="plan",
        value="dsp_plugin.models.video_dit_plan:plan",
        why=f"{type(module).__name__} has no part of class VideoDiT",
        remedy="name the plan of the model that is trained",
    )
