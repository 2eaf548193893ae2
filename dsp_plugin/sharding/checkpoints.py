"""What a config asks of a model's activation checkpoints, put in place: kept attention, and host memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.patches.recompute import TORCH, hold
from dsp_plugin.sharding.unused_offload import refuse_unused
from dsp_plugin.training.offload import Offload


def kept(module: nn.Module, config: SequenceParallelConfig, offload: Offload | None) -> list[Callable[[], object]]:
    """Have the checkpoints of ``module`` keep what the config says, where it says; returns what ends that.

    Raises:
        PatchError: torch is not one that our patches fit.
    """
    keep, ends = config.recompute == "keep_attention", list[Callable[[], object]]()
    if keep or offload is not None:
        ends.append(weakref.finalize(module, hold(TORCH, keep=keep, offload=offload)))
    if offload is not None and not offload.auto:
        ends.append(refuse_unused(module, offload))
    return ends
