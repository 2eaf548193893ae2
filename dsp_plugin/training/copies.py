"""Copies of a module that carries hooks: a copy is the module as it was without them.

A hook belongs to one module: it knows its groups, and takes part in collectives. A copy that kept it would ask peers
that may never make one, so what is put on a module for a run is left behind where the module is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class LeftBehind:
    """A hook of a module; in a copy of the module it does nothing.

    Args:
        hook: as `torch.nn.Module.register_forward_hook` and its kin take it.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the hook returns."""
        return self._hook(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing


class Undo(list[Callable[[], object]]):
    """What takes hooks off a module; a copy of the module has none of them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Undo:
        return Undo()


def _nothing(*_: object, **__: object) -> None:
    """What is left of a hook in a copy."""
