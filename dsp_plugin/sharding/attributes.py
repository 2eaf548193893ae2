"""Attributes that differ while a model's tokens are sharded: buffers cut to this rank's part, settings overridden."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.plans.plan import Plan


class RegionAttributes:
    """Puts a plan's ``buffers`` and ``overrides`` in force, and takes them back.

    Args:
        root: what their paths are relative to.

    Raises:
        SequenceParallelConfigError: the root has no such attribute, or a buffer is no tensor.
    """

    def __init__(self, root: nn.Module, plan: Plan) -> None:
        self._root, self._plan = root, plan
        self._undo: list[Callable[[], None]] = []
        self._whole: dict[str, Tensor] = {}
        for path in (*plan.buffers, *plan.overrides):
            owner, name = _owner(root, path)
            if path in plan.buffers and not isinstance(getattr(owner, name), Tensor):
                raise SequenceParallelConfigError(
                    setting=f"plan.buffers {path!r}",
                    why=f"it is a {type(getattr(owner, name)).__name__}, not a tensor",
                    remedy="name buffers or parameters",
                )

    def bind(self, root: nn.Module) -> None:
        """Work on ``root`` from now on: the model, or a copy of it."""
        self._root = root

    def override(self) -> None:
        """Put the overrides in force."""
        for path, value in self._plan.overrides.items():
            self._replace(path, value)

    @contextmanager
    def overridden(self, root: nn.Module) -> Iterator[None]:
        """The overrides of ``root`` in force inside, also where something else is in force around it."""
        if self._undo:
            yield
            return
        self.bind(root)
        self.override()
        try:
            yield
        finally:
            self.restore()

    def cut(self, own_part: Callable[[Tensor, str, str], Tensor]) -> None:
        """Put each buffer's part in its place: ``own_part`` of the whole buffer, its pattern, and a name for errors."""
        for path, pattern in self._plan.buffers.items():
            if path not in self._whole:
                owner, name = _owner(self._root, path)
                self._whole[path] = getattr(owner, name)
            self._replace(path, own_part(self._whole[path], pattern, f"plan.buffers {path!r}"))

    def restore(self) -> None:
        """Everything as it was."""
        while self._undo:
            self._undo.pop()()
        self._whole.clear()

    def _replace(self, path: str, value: Any) -> None:
        owner, name = _owner(self._root, path)
        if isinstance(owner, nn.Module):
            for store in (owner._parameters, owner._buffers):
                if name in store:
                    self._undo.append(_hide(owner, store, name, value))
                    return
        before = vars(owner).get(name, _ABSENT)
        object.__setattr__(owner, name, value)

        def undo() -> None:
            if before is _ABSENT:
                object.__delattr__(owner, name)
            else:
                object.__setattr__(owner, name, before)

        self._undo.append(undo)


_ABSENT = object()


def _hide(owner: nn.Module, store: Mapping[str, Any], name: str, value: Any) -> Callable[[], None]:
    """Let a plain attribute stand for a registered tensor, whose gradient then flows through the value."""
    assert isinstance(store, dict)
    whole = store.pop(name)
    object.__setattr__(owner, name, value)

    def undo() -> None:
        object.__delattr__(owner, name)
        store[name] = whole

    return undo


def _owner(root: nn.Module, path: str) -> tuple[Any, str]:
    *way, name = path.split(".")
    owner: Any = root
    for step in way:
        owner = getattr(owner, step, None)
    if owner is None or not hasattr(owner, name):
        raise SequenceParallelConfigError(
            setting="plan.buffers or plan.overrides",
            value=path,
            why=f"{type(root).__name__} has no such attribute",
            remedy="write the path from the model that the plan is for, as in encoder.pos_embed",
        )
    return owner, name
