"""What DeepSpeed's activation checkpointing runs again, and torch's, which models come with."""

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
from dsp_plugin.training.extents import entering_again
from dsp_plugin.training.recompute import keeping_attention

_RELEASE = "_sequence_parallel_recompute"
_MODULE = "deepspeed.runtime.activation_checkpointing.checkpointing"


def _function(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces the non-reentrant implementation, which calls its function once forward and once backward."""

    @functools.wraps(upstream)
    def non_reentrant_checkpoint(function: Callable[..., Any], *args: Any) -> Any:
        if torch.is_grad_enabled():
            if recompute.kept():
                function = keeping_attention(function)
            function = entering_again(function, runs_first=True)
        return upstream(function, *args)

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


CHECKPOINTS = recompute.known(
    PatchSet(
        "what DeepSpeed runs again",
        (
            recompute.checkpoint_function(_MODULE, DISTRIBUTION, SUPPORTED),
            Patch(
                recompute.name_of_non_reentrant(_MODULE),
                f"{_MODULE}:non_reentrant_checkpoint",
                DISTRIBUTION,
                SUPPORTED,
                _function,
                ("function",),
            ),
        ),
    )
)
PATCHES = PatchSet(
    "what an engine's model runs again",
    (
        *recompute.TORCH,
        *CHECKPOINTS,
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


def hold_for(engine: Any, module: nn.Module, *, keep: bool) -> Callable[[], object]:
    """Patches until the engine is destroyed or its module is gone.

    Args:
        keep: whether attention is kept.

    Returns:
        What ends it earlier.

    Raises:
        PatchError: torch or DeepSpeed is not one that the patches fit, and attention is to be kept.
    """
    held = recompute.hold(PATCHES, keep=True) if keep else recompute.hold_where_it_fits(PATCHES)
    release = weakref.finalize(module, held)
    # An engine that is only dropped stays, and its module with it: DeepSpeed's hooks form cycles through autograd.
    setattr(engine, _RELEASE, release)
    return release
