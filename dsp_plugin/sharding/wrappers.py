"""Modules that only pass their arguments on to another: what they wrap is what is sharded.

And compiled modules: `torch.compile` must neither trace our hooks, which talk to other ranks, nor go on with what it
compiled before they were there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.nn.parallel import DistributedDataParallel

from dsp_plugin.errors import UnsupportedError

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

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        # Where nothing is compiled, the compiler need not be imported: that takes seconds.
        return (shielded if _may_compile() else function)(*args, **kwargs)

    return call


def forget_compiled() -> None:
    """What has been compiled does not look at hooks again: all of it is compiled anew."""
    if _may_compile():
        torch.compiler.reset()


def _may_compile() -> bool:
    return "torch._dynamo" in sys.modules
