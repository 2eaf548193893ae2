"""Refuses an offload of checkpoints where a model makes none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.sharding.compiling import uncompiled
from dsp_plugin.training.host_blocks import SETTING
from dsp_plugin.training.offload import Offload


def refuse_unused(module: nn.Module, offload: Offload) -> Callable[[], None]:
    """The first forward pass of training that makes no checkpoint raises; returns what ends that.

    Every rank comes to the same, for all run the same model.
    """

    @uncompiled
    def after(module: nn.Module, args: tuple, output: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        handle.remove()
        if not offload.stretches:
            raise UnsupportedError(
                setting=SETTING,
                why="the first forward pass of training made no checkpoint that keeps its inputs, so that there is "
                "nothing to keep in host memory",
                remedy="turn on activation checkpointing, as in model.gradient_checkpointing_enable() or in "
                "TrainingArguments(gradient_checkpointing=True), outside of what is compiled and of other hooks on "
                f"saved tensors, or drop {SETTING}",
            )

    handle = module.register_forward_hook(after)
    return handle.remove
