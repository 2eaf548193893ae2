"""Modules that only pass their arguments on to another: what they wrap is what is sharded."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.sharding.compiling import pass_over
from dsp_plugin.training.extents import Running

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


def ended_with(module: nn.Module, passes: Running[Any], leave: Callable[[], object]) -> Callable[[], None]:
    """End, with a call of ``module``, the passes that began in it, if it is left by anything raised.

    torch runs hooks with ``always_call`` for an `Exception` only, and never for Ctrl-C.

    Args:
        leave: called before, in the state of the pass.

    Returns:
        What undoes it.
    """
    own: MethodType | None = vars(module).get("_call_impl")
    call_impl = type(module)._call_impl if own is None else own.__func__

    def call(called: nn.Module, *args: object, **kwargs: object) -> object:
        begun = passes.begun
        try:
            return call_impl(called, *args, **kwargs)
        except BaseException:
            if passes.begun > begun:
                leave()
            while passes.begun > begun:
                passes.end()
            raise

    def undo() -> None:
        if own is None:
            del vars(module)["_call_impl"]
        else:
            vars(module)["_call_impl"] = own

    pass_over(call)
    # Bound, so that a copy of the module calls itself.
    vars(module)["_call_impl"] = MethodType(call, module)
    return undo
