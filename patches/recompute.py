"""What activation checkpointing runs again: torch's own here, other frameworks' by `checkpoint_function`.

Scripts and models call ``checkpoint`` by a name that they imported before us, so what it calls is patched instead. The
reentrant implementations of torch, DeepSpeed and Megatron are one `torch.autograd.Function` each, all of one form:
`forward` runs the function that it is given and stores it, `backward` runs it again. Exchanging that function is all
there is to do: for one that enters again what was in force around its first run (`dsp_plugin.training.extents`), and
under ``recompute: "keep_attention"`` for one that keeps attention.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import torch

from dsp_plugin.errors import PatchError
from dsp_plugin.patches.patch import Patch, PatchSet
from dsp_plugin.training.extents import entering_again, noting
from dsp_plugin.training.recompute import keep_attention, keeping_attention

_holders: Counter[str] = Counter()
_KEEPING = "recompute: keep_attention"


def kept() -> bool:
    """Whether somebody holds patches to keep attention."""
    return _holders[_KEEPING] > 0


def checkpoint_function(module: str, distribution: str, supported: str, keeps: Callable[[], bool] = kept) -> Patch:
    """The patch of the `CheckpointFunction` of a module.

    Args:
        keeps: asked in every checkpoint that is made: whether it keeps attention.
    """
    return Patch(
        f"what {module} runs again",
        f"{module}:CheckpointFunction.forward",
        distribution,
        supported,
        functools.partial(_forward, keeps),
        ("ctx", "run_function"),
    )


def _forward(keeps: Callable[[], bool], upstream: staticmethod[Any, Any]) -> staticmethod[Any, Any]:
    original = upstream.__func__

    @functools.wraps(original)
    def forward(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        # There are none where autograd records nothing: then there is no backward pass to keep anything for.
        if ctx.next_functions:
            if keeps():
                run_function = keeping_attention(run_function)
            run_function = entering_again(run_function, runs_first=True)
        return original(ctx, run_function, *args)

    return staticmethod(forward)


def _generator(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces torch's non-reentrant implementation, which calls its function in the backward pass only."""
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def generator(*args: Any, **kwargs: Any) -> Any:
        from torch.utils import checkpoint

        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        if torch.compiler.is_compiling():
            return upstream(*args, **kwargs)
        begun: list[Any] = []
        call.arguments["fn"] = entering_again(call.arguments["fn"], runs_first=False, begun=begun)
        debug = checkpoint._checkpoint_debug_enabled
        # Its debug mode has contexts of its own.
        taken = call.arguments["debug"] if debug is None else debug
        if kept() and call.arguments["context_fn"] is checkpoint.noop_context_fn and not taken:
            call.arguments["context_fn"] = keep_attention
        return _noting(begun, upstream(*call.args, **call.kwargs))

    return generator


def _noting(begun: list[Any], around: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """A generator whose caller runs the checkpointed function for the first time where it yields."""
    with noting(begun):
        yield from around


_TORCH, _TORCH_SUPPORTED = "torch.utils.checkpoint", ">=2.6,<2.14"

TORCH = PatchSet(
    "what torch runs again",
    (
        checkpoint_function(_TORCH, "torch", _TORCH_SUPPORTED),
        Patch(
            f"what {_TORCH} runs again, non-reentrant",
            f"{_TORCH}:_checkpoint_without_reentrant_generator",
            "torch",
            _TORCH_SUPPORTED,
            _generator,
            ("fn", "context_fn", "debug"),
        ),
    ),
)


def hold(patches: PatchSet, *, keep: bool) -> Callable[[], None]:
    """Applies patches for one owner, such as an engine.

    Args:
        keep: whether attention is kept, in all checkpoints of the process.

    Returns:
        What ends it. A patch is reverted when nobody holds it any more.

    Raises:
        PatchError: a patch does not fit; none is applied then.
    """
    patches.apply()
    names = [_KEEPING] * keep + [patch.name for patch in patches]
    _holders.update(names)
    held = True

    def release() -> None:
        nonlocal held
        if not held:
            return
        held = False
        _holders.subtract(names)
        for patch in reversed(patches.patches):
            if not _holders[patch.name]:
                patch.revert()

    return release


def enter_again(patches: PatchSet = TORCH) -> Callable[[], None]:
    """`hold`, for who can do without on a version that the patches do not fit, where routing refuses what it must."""
    with suppress(PatchError):
        return hold(patches, keep=False)
    return lambda: None
