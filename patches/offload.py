"""Where checkpoints keep their inputs, so that these can wait in host memory (`dsp_plugin.training.offload`).

Reentrant checkpoints are `torch.autograd.Function`s that save their inputs, as torch's and Megatron's do: autograd
takes hold of them after `forward`, so they are packed where ``apply`` returns. Torch's non-reentrant ones save them
before the function runs and before they push their own hooks: hooks that are pushed earlier get the inputs, and nothing
else. Whoever has pushed hooks of his own around a checkpoint keeps its inputs already, and keeps them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dsp_plugin.errors import PatchError
from dsp_plugin.patches.patch import Patch
from dsp_plugin.training.offload import Stretch, in_force, unpack


def stretch_of(inputs: Sequence[Any]) -> Stretch | None:
    """The stretch of a checkpoint that is being made with these inputs; None where they stay where they are."""
    offload = in_force()
    if offload is None or not torch.is_grad_enabled() or torch.compiler.is_compiling() or _hooked():
        return None
    return offload.stretch(inputs)


def check_torch() -> None:
    """Whether this torch tells what the inputs of checkpoints are kept by.

    Raises:
        PatchError: it does not.
    """
    if not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        raise PatchError(
            f"memory.offload needs a torch that tells who packs saved tensors, as 2.13 does; this is "
            f"{torch.__version__}. Install a newer one, or drop memory.offload."
        )


def _hooked() -> bool:
    """Whether somebody else packs what is saved now: an outer checkpoint, which keeps none of it, or the user."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


@contextmanager
def inputs_packed(stretch: Stretch | None) -> Iterator[None]:
    """While entered, a non-reentrant checkpoint saves its inputs, and then runs its function."""
    if stretch is None:
        yield
        return
    try:
        with saved_tensors_hooks(stretch.pack, unpack), stretch.running():
            yield
    finally:
        stretch.packed()


class _Making:
    """What a checkpoint's ``apply`` is told by its ``forward``."""

    def __init__(self) -> None:
        self.stretch: Stretch | None = None
        self.ctx: Any = None
        self.saved: Sequence[Any] = ()


class _Local(threading.local):
    def __init__(self) -> None:
        self.making: list[_Making] = []


_local = _Local()


def running_first(original: Callable[..., Any], ctx: Any, run_function: Callable[..., Any], args: tuple) -> Any:
    """The ``forward`` of a `CheckpointFunction`, with its inputs on their way to the host while its function runs."""
    making = _local.making[-1] if _local.making else None
    if making is None or making.stretch is None:
        return original(ctx, run_function, *args)
    with making.stretch.running():
        result = original(ctx, run_function, *args)
    # Megatron saves a part of an input, if it distributes it: not what was given, but what is saved by now.
    making.ctx, making.saved = ctx, ctx.to_save or ()
    return result


Early = Callable[[Sequence[Any]], Sequence[Any]]
Pack = Callable[[Stretch, Any, Sequence[Any]], None]


def applied(module: str, distribution: str, supported: str, early: Early = tuple, pack: Pack | None = None) -> Patch:
    """The patch of the `CheckpointFunction` of a module that packs what the function saves.

    Args:
        early: of the arguments of ``apply``, those of which it is known that they are saved as they are.
        pack: packs what a function's context keeps, called with the stretch, the context, and what was given to
            ``save_for_backward``; by default that.
    """
    return Patch(
        f"where {module} keeps it",
        f"{module}:CheckpointFunction.apply",
        distribution,
        supported,
        functools.partial(_apply, early, pack or _pack),
    )


def _apply(early: Early, pack: Pack, upstream: classmethod[Any, Any, Any]) -> classmethod[Any, Any, Any]:
    original = upstream.__func__

    @functools.wraps(original)
    def apply(cls: Any, *args: Any) -> Any:
        if in_force() is None:
            return original(cls, *args)
        with _made() as making:
            # Where nothing of it needs a gradient, nothing is saved.
            if any(isinstance(x, Tensor) and x.requires_grad for x in args):
                making.stretch = stretch_of(early(args))
            result = original(cls, *args)
            if making.ctx is not None and making.stretch is not None:
                pack(making.stretch, making.ctx, making.saved)
            return result

    return classmethod(apply)


@contextmanager
def _made() -> Iterator[_Making]:
    making = _Making()
    _local.making.append(making)
    try:
        yield making
    finally:
        _local.making.pop()
        if making.stretch is not None:
            making.stretch.packed()


def _pack(stretch: Stretch, ctx: Any, tensors: Sequence[Any]) -> None:
    for tensor, saved in zip(tensors, ctx._raw_saved_tensors, strict=True):
        if isinstance(tensor, Tensor) and not isinstance(tensor, torch.nn.Parameter):
            # What was exchanged meanwhile starts here.
            stretch.add(tensor)
            if stretch.holds(tensor):
                saved.register_hooks(stretch.pack, unpack)
