"""Calls a hook right after a module is imported, whoever imports it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def after_import(module: str, hook: Callable[[], None]) -> None:
    """Calls `hook` right after `module` is imported, or now if it is.

    Args:
        module: dotted name of the module.
        hook: may be called again when the module is reloaded, so it must be idempotent. What it raises, the import
            raises.
    """
    if any(isinstance(finder, PostImportFinder) and finder.module == module for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, PostImportFinder(module, hook))
    if module in sys.modules:
        hook()


class PostImportFinder(MetaPathFinder):
    """Finds one module through the other finders and makes its loader call a hook after executing it."""

    def __init__(self, module: str, hook: Callable[[], None]) -> None:
        self.module = module
        self.hook = hook

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, its loader wrapped; None for every other module (`importlib.abc.MetaPathFinder`)."""
        if fullname != self.module:
            return None
        for finder in sys.meta_path:
            if finder is self:
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _HookedLoader(spec.loader, self.hook)
                return spec
        return None


class _HookedLoader(Loader):
    """The upstream loader, which it stands aside for once the module is executed."""

    def __init__(self, loader: Loader, hook: Callable[[], None]) -> None:
        self._loader = loader
        self._hook = hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._hook()
