"""Methods of one model that stand in for its own, and are no part of its copies.

A copy finds its own methods again: it computes whole sequences, unsharded, as the model would without us. What stands
in says so itself where it is copied: a ``__deepcopy__`` of the model would be taken for one of the wrapper's, since
wrappers hand on what they do not know.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

from torch import nn

from dsp_plugin.errors import UnsupportedError

ABSENT = object()


class Standin:
    """Stands in for a method of a model.

    Args:
        name: the method's.
        call: called in its place.
        own: what the model itself, not its class, had by this name.
    """

    def __init__(self, model: nn.Module, name: str, call: Callable[..., Any], own: object) -> None:
        # Signatures are read of it.
        functools.update_wrapper(self, getattr(model, name))
        self._model, self._name, self._call, self._own = model, name, call, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What stands in returns."""
        return self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if not weights_are_whole(self._model):
            raise UnsupportedError(
                setting="copy.deepcopy of a model under ZeRO 3",
                why="every rank holds a part of its weights, and a copy would have none",
                remedy="copy the model before deepspeed.initialize, or build another one and load the weights that "
                "engine.save_16bit_model writes",
            )
        if self._own is not ABSENT:
            return copy.deepcopy(self._own, memo)
        copied = memo.get(id(self._model))
        return self if copied is None else MethodType(getattr(type(copied), self._name), copied)


class Overlay:
    """Puts attributes on a model.

    Attributes:
        aside: whether the model is to compute as its own methods do.
        generated: whether it has generated.

    Args:
        undo: gets what takes them off.
    """

    def __init__(self, model: nn.Module, undo: ExitStack) -> None:
        self._model, self._undo = model, undo
        self.aside = self.generated = False

    def replace(self, name: str, call: Callable[..., Any]) -> None:
        """Have ``call`` stand in for a method."""
        self.put(name, Standin(self._model, name, call, vars(self._model).get(name, ABSENT)))

    def put(self, name: str, value: object) -> None:
        """Have the model's attribute be ``value``, which knows how to be copied."""
        attributes = vars(self._model)
        before = attributes.get(name, ABSENT)
        attributes[name] = value
        if before is ABSENT:
            self._undo.callback(attributes.pop, name)
        else:
            self._undo.callback(attributes.__setitem__, name, before)

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """The model computes as its own methods do."""
        before, self.aside = self.aside, True
        try:
            yield
        finally:
            self.aside = before


def unsharded_generate(model: Any, overlay: Overlay) -> Callable[..., Any]:
    """What stands in for a model's ``generate``: every rank computes whole sequences, by the model's own attention.

    Where weights are gathered for every layer, ranks must take the same number of steps: those that are done before
    others go on with them.
    """
    upstream = model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        if not weights_are_whole(model):
            kwargs.setdefault("synced_gpus", True)
        overlay.generated = True
        with overlay.set_aside():
            return upstream(*args, **kwargs)

    return generate


def weights_are_whole(model: nn.Module) -> bool:
    """Whether every rank holds all of them, which it does not under ZeRO 3."""
    return not any(hasattr(parameter, "ds_id") for parameter in model.parameters())
