"""Where `VisionTransformer` mixes tokens: all that is needed to shard it, from its pixels to its predictions."""

from __future__ import annotations

from torch import nn

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.plans.plan import Plan
from dsp_plugin.plans.stage import Region, Stage


def plan(module: nn.Module) -> Plan:
    """The plan of a `VisionTransformer`, or of a module that holds one, such as a training objective.

    Tokens are cut as pixels, before the variables of a patch are embedded: with many variables that is by far the
    largest activation. Embedding, aggregation and readout treat every token alike. A block attends along the dim that
    it is named after: under axial attention that is one of the grid's, under full attention the whole sequence, class
    token and registers included.

    Raises:
        SequenceParallelConfigError: there is no `VisionTransformer` in the module.
    """
    # By name, not by class: a script that loads the model's file on its own has another class object.
    for name, part in module.named_modules():
        if type(part).__name__ == "VisionTransformer":
            return _plan_of(part, f"{name}." if name else "")
    raise SequenceParallelConfigError(
        setting="plan",
        value="dsp_plugin.models.vit_plan:plan",
        why=f"{type(module).__name__} has no part of class VisionTransformer",
        remedy="name the plan of the model that is trained",
    )


def _plan_of(model: nn.Module, prefix: str) -> Plan:
    dims = tuple(model.get_submodule("trunk.blocks.0")._modules)
    heads, classes, width = model.heads, model.classes, model.width
    assert isinstance(heads, int)
    assert isinstance(classes, int)
    assert isinstance(width, int)
    tokens = " ".join(dims)
    return Plan(
        tokens=f"b {tokens} c",
        region=Region(
            f"{prefix}trunk",
            layout=f"b {tokens} v p",
            leaves=f"b {tokens} (w p)" + (f"+{classes}" if classes else ""),
        ),
        stages=(
            Stage(f"{prefix}trunk.locate", (), follows={"place_NG": f"{tokens} g", "lead_B": "b"}),
            *(
                Stage(
                    f"{prefix}trunk.blocks.*.{dim}",
                    (dim,),
                    follows={"rope": f"{dim} d"},
                    attention="attn",
                    heads=heads,
                )
                for dim in dims
            ),
        ),
        inputs={"wanted": "w"},
        sizes={"c": width},
    )
