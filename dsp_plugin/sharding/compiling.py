"""What `torch.compile` leaves alone: all of the library's own code, of which much talks to other ranks.

A graph of the compiler's ends where ours begins, and another begins in what ours calls: the model's own layers are
compiled, attention and the moves of tokens run between them as they do without a compiler.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, wraps
from types import CodeType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch._compile import _disable_dynamo

from dsp_plugin.patches.post_import import after_import
from dsp_plugin.training.copies import LeftBehind

Given = ParamSpec("Given")
Result = TypeVar("Result")

# What the compiler says where it is forbidden to end a graph, as by ``fullgraph=True``.
REASON = (
    "dsp_plugin exchanges tokens with other ranks here, which no graph can hold; leave out fullgraph=True, or compile "
    "parts of the model in which nothing is exchanged, such as MLPs and norms"
)
# Packages of ours whose modules are left alone one by one, for some of them are models, written as users write theirs.
_PACKAGES = ("dsp_plugin", "dsp_plugin.patches", "dsp_plugin.patches.megatron")
_MODELS = ("models", "launch")


def uncompiled(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """``function``, which `torch.compile` never traces, nor anything that it calls."""
    shielded = _disable_dynamo(function)

    def call(*args: Given.args, **kwargs: Given.kwargs) -> Result:
        # Where nothing is compiled, the compiler need not be imported: that takes seconds.
        return (shielded if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    pass_over(call)
    return wraps(function)(call)


_passed_over: set[CodeType] = set()


def pass_over(function: Callable[..., object]) -> None:
    """Let the compiler leave the frames of a function alone, though not what it calls.

    Both ways are needed: what calls it is compiled up to the call, and then its own frame comes to the compiler, which
    would compile one code anew for each closure, up to its limit.
    """
    marks = {
        "_torchdynamo_disable": True,
        "_torchdynamo_disable_recursive": False,
        "_torchdynamo_disable_msg": REASON,
    }
    vars(function).update(marks)
    pass_over_frames((function.__code__,))


def pass_over_frames(codes: Iterable[CodeType]) -> None:
    """Let the compiler leave frames alone, though not what they call, nor their code where it is part of a graph."""
    _passed_over.update(codes)
    after_import("torch._dynamo", _skip)
    if "torch._dynamo" in sys.modules:
        _skip()


def pass_over_decorators(model: nn.Module) -> None:
    """Let the compiler leave alone what decorates the forwards of a model's modules.

    All that one decorator decorates has one code, which would be compiled anew for each, up to the compiler's limit.
    """
    codes: set[CodeType] = set()
    for kind in {type(module) for module in model.modules()}:
        function: Any = kind.forward
        while hasattr(function, "__wrapped__"):
            codes.add(function.__code__)
            function = function.__wrapped__
    pass_over_frames(codes)


_left_alone: set[str] = set()
_told: set[str] = set()


def leave_alone(modules: Iterable[str]) -> None:
    """Let the compiler leave the frames of modules and packages alone, though not what they call.

    Args:
        modules: dotted names.
    """
    _left_alone.update(modules)
    after_import("torch._dynamo", _skip)
    if "torch._dynamo" in sys.modules:
        _skip()


def _skip() -> None:
    skip_code = importlib.import_module("torch._dynamo.eval_frame").skip_code
    for code in _passed_over:
        skip_code(code)
    add = importlib.import_module("torch._dynamo.trace_rules").add
    for module in sorted((_left_alone | _ours()) - _told):
        add(module)
        _told.add(module)


@cache
def _ours() -> frozenset[str]:
    return frozenset(_modules())


def _modules() -> Iterator[str]:
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        for module in pkgutil.iter_modules(spec.submodule_search_locations):
            name = f"{package}.{module.name}"
            if module.name not in _MODELS and name not in _PACKAGES:
                yield name


def forget_compiled() -> None:
    """What has been compiled does not look at hooks again: all of it is compiled anew."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


# Hooks that copies of a module are to lose are called by it.
pass_over(LeftBehind.__call__)
leave_alone(())
