"""Where in a model an operator runs: in forward by the modules that are entered, in backward by those of its forward.

Autograd numbers the nodes that it makes. Every change of module is noted with the number that comes next, so the number
of a node says in which module the node was made, by which the operators of its backward pass go to that module, too.
Every thread numbers its own; a GPU's backward pass has another one, where what is recomputed makes nodes never to run.
"""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right
from types import FrameType
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from dsp_plugin.rehearsal.timeline import BACKWARD, FORWARD, RECOMPUTE, Owner

# What makes a buffer that somebody fills: of these the operator says nothing.
_FACTORIES = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "zeros", "new_zeros", "full")


class ModulePlaces:
    """Follows the modules of ``module`` while it is entered."""

    def __init__(self, module: nn.Module) -> None:
        self._paths = {id(part): path or type(part).__name__ for path, part in module.named_modules()}
        self._stack: list[int] = []
        self._starts: list[int] = []
        self._at: list[str] = []
        self._handles: list[Any] = []
        self._thread = threading.get_ident()
        self.phase = FORWARD

    def __enter__(self) -> Self:
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        return self

    def __exit__(self, *failure: object) -> None:
        for handle in self._handles:
            handle.remove()

    def owner(self, func: Any) -> Owner:
        """Of what ``func``, an operator that runs now, returns."""
        if self._stack:
            module = self._paths[self._stack[-1]]
            phase = RECOMPUTE if self.phase == BACKWARD else self.phase
        else:
            module, phase = self._of_node(), self.phase
        name = func.overloadpacket.__name__
        if name in _FACTORIES:
            name = f"{name} in {_caller()}"
        return Owner(module, name, phase)

    def _of_node(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        index = bisect_right(self._starts, node._sequence_nr()) - 1
        return self._at[index] if index >= 0 else ""

    def _enter(self, module: nn.Module, *_: object) -> None:
        if id(module) in self._paths:
            self._stack.append(id(module))
            self._note()

    def _leave(self, module: nn.Module, *_: object) -> None:
        if id(module) in self._stack:
            while self._stack.pop() != id(module):
                pass
            self._note()

    def _note(self) -> None:
        if threading.get_ident() == self._thread:
            self._starts.append(torch._C._autograd._get_sequence_nr())
            self._at.append(self._paths[self._stack[-1]] if self._stack else "")


def _caller() -> str:
    """The function nearest to the operator that is not torch's."""
    frame: FrameType | None = sys._getframe(1)
    torch_root, here = f"{torch.__path__[0]}/", __file__.rpartition("/")[0]
    while frame is not None:
        file = frame.f_code.co_filename
        # Of a mode that rewrites calls, the caller is meant.
        if not file.startswith((torch_root, here)) and frame.f_code.co_name != "__torch_function__":
            return f"{_short(file)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"


def _short(file: str) -> str:
    return ".".join(file.removesuffix(".py").split("/")[-2:])
