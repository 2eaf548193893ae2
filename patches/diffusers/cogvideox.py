"""CogVideoX in diffusers: why no plan can shard it."""

from __future__ import annotations

from torch import nn

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.plans.plan import Plan


def plan(module: nn.Module) -> Plan:
    """No plan of a `CogVideoXTransformer3DModel`.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        setting="plan",
        value=type(module).__name__,
        why="its blocks hand on text and video as two tensors of tokens and join them inside attention, where all "
        "attend to all; a plan shards one tensor, and the text beside it would be attended to once for every rank",
        remedy="train a model whose text is attended to apart, such as WanTransformer3DModel, or CogVideoX without "
        "sequence_parallel",
    )
