"""Modules that only pass their arguments on to another: what they wrap is what is sharded.

And compiled modules: `torch.compile` must neither trace our hooks, which talk to other ranks, nor go on with what it
compiled before they were there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial, wraps
from types import CodeType
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches.post_import import after_import

Given = ParamSpec("Given")
Result = TypeVar("Result")

# Wrappers in which hooks would run too early, too late or several times, by the names of their classes.
_REFUSED = {
    "FullyShardedDataParallel": "its units gather parameters by the modules that it found when it was built",
    "DataParallel": "it runs copies of the model, which no hook reaches",
    "DeepSpeedEngine": "DeepSpeed has its own hooks around the model",
}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that wrappers with nothing but a call of it pass everything to; ``module`` where it is none.

    DDP and what `torch.compile` returns are looked through: the model behaves as if it had been sharded before.

    Raises:
        UnsupportedError: a wrapper that has to come after.
    """
    while True:
        for kind in type(module).__mro__:
            if kind.__name__ in _REFUSED:
                raise UnsupportedError(
                    setting="module",
                    value=kind.__name__,
                    why=f"it is a wrapper around the model, and {_REFUSED[kind.__name__]}",
                    remedy="call parallelize on the model itself, before it is wrapped"
                    + (', or write a "sequence_parallel" section' if kind.__name__ == "DeepSpeedEngine" else ""),
                )
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif isinstance(inner := module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


def uncompiled(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """``function``, which `torch.compile` never traces, nor anything that it calls."""
    shielded = _disable_dynamo(function)

    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        # Where nothing is compiled, the compiler need not be imported: that takes seconds.
        return (shielded if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    # Both are needed: what calls it is compiled up to the call, and then its own frame comes to the compiler, which
    # would compile one code anew for each of our hooks, up to its limit.
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    after_import("torch._dynamo", partial(_leave_alone, call.__code__))
    return wraps(function)(call)


def _leave_alone(code: CodeType) -> None:
    """Let the compiler, once it is imported, pass over the frames of a function."""
    importlib.import_module("torch._dynamo.eval_frame").skip_code(code)


def forget_compiled() -> None:
    """What has been compiled does not look at hooks again: all of it is compiled anew."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
