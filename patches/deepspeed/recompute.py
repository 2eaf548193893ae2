"""``recompute: "keep_attention"`` in DeepSpeed's activation checkpointing, and in torch's, which models come with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from dsp_plugin.patches import recompute
from dsp_plugin.patches.deepspeed.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch, PatchSet

from dsp_plugin.recompute import keeping_attention

_MODULE = "deepspeed.runtime.activation_checkpointing.checkpointing"


def _keeping(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces the non-reentrant implementation, which calls its function once forward and once backward."""

    @functools.wraps(upstream)
    def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
        return upstream(keeping_attention(function) if torch.is_grad_enabled() else function, *args)

    return non_reentrant_checkpoint


PATCHES = PatchSet(
    "keep attention in DeepSpeed",
    (
        *recompute.TORCH,
        recompute.checkpoint_function(_MODULE, DISTRIBUTION, SUPPORTED),
        Patch(
            f"keep attention in {_MODULE}, non-reentrant",
            f"{_MODULE}:non_reentrant_checkpoint",
            DISTRIBUTION,
            SUPPORTED,
            _keeping,
            ("function",),
        ),
    ),
)
