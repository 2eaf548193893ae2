"""What DeepSpeed's activation checkpointing runs again, and torch's, which models come with."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches import recompute
from dsp_plugin.patches.deepspeed.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.offload import applied, stretch_of
from dsp_plugin.patches.patch import Patch, PatchSet
from dsp_plugin.training.extents import entering_again
from dsp_plugin.training.offload import Handle, Offload, Stretch, in_force
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
        # A tensor that DeepSpeed would take to the device first is none of ours.
        stretch = stretch_of(_on_device(args))
        if stretch is None:
            return upstream(function, *args)
        try:
            return upstream(_resolving(function, stretch, args), *(_packed(stretch, x) for x in args))
        finally:
            stretch.packed()

    return non_reentrant_checkpoint


def _resolving(function: Callable[..., Any], stretch: Stretch, args: tuple) -> Callable[..., Any]:
    """``function`` for who knows its arguments as `_packed`: first called with ``args``, then with what came back."""
    first = [args]

    @functools.wraps(function)
    def run(*given: Any) -> Any:
        if first:
            with stretch.running():
                return function(*first.pop())
        return function(*map(_restored, given))

    return run


def _packed(stretch: Stretch, value: Any) -> Any:
    return stretch.pack(value) if isinstance(value, Tensor) else value


def _restored(value: Any) -> Any:
    return value.tensor().requires_grad_(value.requires_grad) if isinstance(value, Handle) else value


def _pack(stretch: Stretch, ctx: Any, saved: Sequence[Any]) -> None:
    """DeepSpeed's function keeps its tensors by itself, out of autograd's sight."""
    ctx.deepspeed_saved_tensors = tuple(_packed(stretch, x) for x in ctx.deepspeed_saved_tensors)


def _unpacking(upstream: staticmethod[Any, Any]) -> staticmethod[Any, Any]:
    """Replaces ``CheckpointFunction.backward``."""
    original = upstream.__func__

    @functools.wraps(original)
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.deepspeed_saved_tensors is not None:
            ctx.deepspeed_saved_tensors = tuple(map(_restored, ctx.deepspeed_saved_tensors))
        return original(ctx, *grads)

    return staticmethod(backward)


def _on_device(args: Sequence[Any]) -> Sequence[Any]:
    _check_alone()
    from deepspeed.accelerator import get_accelerator

    device = str(get_accelerator().device_name())
    return [x for x in args if isinstance(x, Tensor) and x.device.type == device]


def _check_alone() -> None:
    """That DeepSpeed does not move or cut the same tensors.

    Raises:
        UnsupportedError: it does.
    """
    if in_force() is None:
        return
    from deepspeed.runtime.activation_checkpointing import checkpointing

    for setting, on in (
        ("cpu_checkpointing", checkpointing.CPU_CHECKPOINT),
        ("partition_activations", checkpointing.PARTITION_ACTIVATIONS),
    ):
        if on:
            raise UnsupportedError(
                setting=f"activation_checkpointing.{setting}",
                value=True,
                why="memory.offload keeps these tensors in host memory, and DeepSpeed would move or cut them, too",
                remedy=f"set {setting} to false, or drop memory.offload",
            )


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
            applied(_MODULE, DISTRIBUTION, SUPPORTED, _on_device, _pack),
            Patch(
                f"what {_MODULE} gets back",
                f"{_MODULE}:CheckpointFunction.backward",
                DISTRIBUTION,
                SUPPORTED,
                _unpacking,
                ("ctx", "grads"),
            ),
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


def hold_for(engine: Any, module: nn.Module, *, keep: bool, offload: Offload | None = None) -> Callable[[], object]:
    """Patches until the engine is destroyed or its module is gone.

    Args:
        keep: whether attention is kept.
        offload: where checkpoints are kept, if not on the device.

    Returns:
        What ends it earlier.

    Raises:
        PatchError: torch or DeepSpeed is not one that the patches fit, and one of these is asked for.
    """
    needed = keep or offload is not None
    held = recompute.hold(PATCHES, keep=keep, offload=offload) if needed else recompute.hold_where_it_fits(PATCHES)
    release = weakref.finalize(module, held)
    # An engine that is only dropped stays, and its module with it: DeepSpeed's hooks form cycles through autograd.
    setattr(engine, _RELEASE, release)
    return release
