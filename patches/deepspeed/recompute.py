"""``recompute: "keep_attention"`` in DeepSpeed's activation checkpointing, and in torch's, which models come with."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dsp_plugin.patches import recompute
from dsp_plugin.patches.deepspeed.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch, PatchSet
from dsp_plugin.training.recompute import keeping_attention

_RELEASE = "_sequence_parallel_recompute"
_MODULE = "deepspeed.runtime.activation_checkpointing.checkpointing"


def _keeping(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces the non-reentrant implementation, which calls its function once forward and once backward."""

    @functools.wraps(upstream)
    def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
        return upstream(keeping_attention(function) if torch.is_grad_enabled() else function, *args)

    return non_reentrant_checkpoint


def _releasing(upstream: Callable[..., None]) -> Callable[..., None]:
    """Replaces `DeepSpeedEngine.destroy`."""

    @functools.wraps(upstream)
    def destroy(self: Any, *args: Any, **kwargs: Any) -> None:
        upstream(self, *args, **kwargs)
        release: Callable[[], None] | None = vars(self).pop(_RELEASE, None)
        if release is not None:
            release()

    return destroy


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
        Patch(
            "end with the engine what it asked of checkpointing",
            "deepspeed.runtime.engine:DeepSpeedEngine.destroy",
            DISTRIBUTION,
            SUPPORTED,
            _releasing,
            ("self",),
        ),
    ),
)


def keep_for(engine: Any, module: nn.Module) -> Callable[[], object]:
    """Keeps attention until the engine is destroyed or its module is gone.

    Returns:
        What ends it earlier.

    Raises:
        PatchError: torch or DeepSpeed is not one that the patches fit.
    """
    release = weakref.finalize(module, recompute.hold(PATCHES))
    # An engine that is only dropped stays, and its module with it: DeepSpeed's hooks form cycles through autograd.
    setattr(engine, _RELEASE, release)
    return release
