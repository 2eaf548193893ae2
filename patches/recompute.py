"""``recompute: "keep_attention"`` in activation checkpointing: what all frameworks have in common, and torch's own.

Scripts and models call ``checkpoint`` by a name that they imported before us, so what it calls is patched instead. The
reentrant implementations of torch, DeepSpeed and Megatron are one `torch.autograd.Function` each, all of one form:
`forward` runs the function that it is given and stores it, `backward` runs it again. Exchanging that function for one
that keeps attention is all there is to do.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from dsp_plugin.patches.patch import Patch, PatchSet
from dsp_plugin.training.recompute import keep_attention, keeping_attention


def checkpoint_function(module: str, distribution: str, supported: str) -> Patch:
    """The patch of the `CheckpointFunction` of a module."""
    return Patch(
        f"keep attention in {module}",
        f"{module}:CheckpointFunction.forward",
        distribution,
        supported,
        _forward_keeping,
        ("ctx", "run_function"),
    )


def _forward_keeping(upstream: staticmethod[Any, Any]) -> staticmethod[Any, Any]:
    forward = upstream.__func__

    @functools.wraps(forward)
    def keeping(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        # There are none where autograd records nothing: then there is no backward pass to keep anything for.
        if ctx.next_functions:
            run_function = keeping_attention(run_function)
        return forward(ctx, run_function, *args)

    return staticmethod(keeping)


def _generator_keeping(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces the contexts of torch's non-reentrant implementation where the user gave none."""
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def generator(*args: Any, **kwargs: Any) -> Any:
        from torch.utils import checkpoint

        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        debug = checkpoint._checkpoint_debug_enabled
        # Its debug mode and torch.compile have contexts of their own.
        taken = (call.arguments["debug"] if debug is None else debug) or torch.compiler.is_compiling()
        if call.arguments["context_fn"] is checkpoint.noop_context_fn and not taken:
            call.arguments["context_fn"] = keep_attention
        return upstream(*call.args, **call.kwargs)

    return generator


_TORCH, _TORCH_SUPPORTED = "torch.utils.checkpoint", ">=2.6,<2.14"

TORCH = PatchSet(
    "keep attention in torch",
    (
        checkpoint_function(_TORCH, "torch", _TORCH_SUPPORTED),
        Patch(
            f"keep attention in {_TORCH}, non-reentrant",
            f"{_TORCH}:_checkpoint_without_reentrant_generator",
            "torch",
            _TORCH_SUPPORTED,
            _generator_keeping,
            ("context_fn", "debug"),
        ),
    ),
)
_holders: Counter[str] = Counter()


def hold(patches: PatchSet) -> Callable[[], None]:
    """Applies patches for one owner, such as an engine.

    Returns:
        What ends it. A patch is reverted when nobody holds it any more.

    Raises:
        PatchError: a patch does not fit; none is applied then.
    """
    patches.apply()
    _holders.update(patch.name for patch in patches)
    held = True

    def release() -> None:
        nonlocal held
        if not held:
            return
        held = False
        for patch in reversed(patches.patches):
            _holders[patch.name] -= 1
            if not _holders[patch.name]:
                patch.revert()

    return release
