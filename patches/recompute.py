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
from contextlib import ExitStack, suppress
from typing import Any

import torch

from dsp_plugin.errors import PatchError
from dsp_plugin.patches.offload import applied, check_torch, inputs_packed, running_first, stretch_of
from dsp_plugin.patches.patch import Patch, PatchSet
from dsp_plugin.training import offload as host
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
        return running_first(original, ctx, run_function, args)

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
        stretch = stretch_of(call.arguments["args"])
        return _around(begun, stretch, upstream(*call.args, **call.kwargs))

    return generator


def name_of_non_reentrant(module: str) -> str:
    """What the patch is called that hands the non-reentrant checkpoint of a module what it runs again."""
    return f"what {module} runs again, non-reentrant"


def _hooks(upstream: Callable[[Any], None]) -> Callable[[Any], None]:
    """Replaces `saved_tensors_hooks.__enter__`: non-reentrant checkpoints of all kinds run again when they unpack."""

    @functools.wraps(upstream)
    def __enter__(self: Any) -> None:  # noqa: N807
        by = getattr(self.pack_hook, "__module__", None)
        # A checkpoint that is patched enters the extents by itself, once for all tensors that it unpacks.
        if torch.compiler.is_compiling() or by == host.__name__ or _holders[name_of_non_reentrant(str(by))]:
            return upstream(self)
        own, self.unpack_hook = self.unpack_hook, entering_again(self.unpack_hook, runs_first=False)
        try:
            return upstream(self)
        finally:
            self.unpack_hook = own

    return __enter__


def _around(
    begun: list[Any], stretch: host.Stretch | None, upstream: Generator[Any, Any, Any]
) -> Generator[Any, Any, Any]:
    """A generator whose caller runs the checkpointed function for the first time where it yields."""
    with noting(begun), inputs_packed(stretch):
        yield from upstream


_TORCH, _TORCH_SUPPORTED = "torch.utils.checkpoint", ">=2.6,<2.14"

TORCH = PatchSet(
    "what torch runs again",
    (
        checkpoint_function(_TORCH, "torch", _TORCH_SUPPORTED),
        applied(_TORCH, "torch", _TORCH_SUPPORTED),
        Patch(
            name_of_non_reentrant(_TORCH),
            f"{_TORCH}:_checkpoint_without_reentrant_generator",
            "torch",
            _TORCH_SUPPORTED,
            _generator,
            ("fn", "context_fn", "debug", "args"),
        ),
        Patch(
            "what saved tensors are unpacked by",
            "torch.autograd.graph:saved_tensors_hooks.__enter__",
            "torch",
            _TORCH_SUPPORTED,
            _hooks,
            ("self",),
        ),
    ),
)
# Of torch, and of the frameworks that have been imported.
_known = [TORCH]
_entering: list[ExitStack] = []


def hold(patches: PatchSet, *, keep: bool, offload: host.Offload | None = None) -> Callable[[], None]:
    """Applies patches for one owner, such as an engine.

    Args:
        keep: whether attention is kept, in all checkpoints of the process.
        offload: where all checkpoints of the process are kept, if not on the device.

    Returns:
        What ends it. A patch is reverted when nobody holds it any more.

    Raises:
        PatchError: a patch does not fit; none is applied then.
    """
    if offload is not None:
        check_torch()
    patches.apply()
    ends = host.hold(offload) if offload is not None else lambda: None
    names = [_KEEPING] * keep + [patch.name for patch in patches]
    _holders.update(names)
    held = True

    def release() -> None:
        nonlocal held
        if not held:
            return
        held = False
        ends()
        _holders.subtract(names)
        for patch in reversed(patches.patches):
            if not _holders[patch.name]:
                patch.revert()

    return release


def hold_where_it_fits(patches: PatchSet) -> Callable[[], None]:
    """`hold` without keeping attention; nothing where the patches do not fit, for who can do without."""
    with suppress(PatchError):
        return hold(patches, keep=False)
    return lambda: None


def known(patches: PatchSet) -> PatchSet:
    """Have `enter_again` hold ``patches``, too, of a framework that is there now."""
    _known.append(patches)
    for held in _entering:
        held.callback(hold_where_it_fits(patches))
    return patches


def enter_again() -> Callable[[], None]:
    """`hold` for all that is `known`, where the patches fit the version; elsewhere routing refuses what it must."""
    held = ExitStack()
    for patches in _known:
        held.callback(hold_where_it_fits(patches))
    _entering.append(held)

    def release() -> None:
        _entering[:] = [other for other in _entering if other is not held]
        held.close()

    return release
