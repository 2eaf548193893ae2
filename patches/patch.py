"""A change to an upstream package as an object: checked before it is made, made once, and undone on request.

The record of a change is kept on the object that was changed (its owner), so any equal `Patch`, built anywhere, sees
that it is already applied and can revert it. Nothing is remembered by this module.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import FunctionType, MethodType, ModuleType, TracebackType
from typing import Any, cast

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from dsp_plugin.errors import PatchError

ALLOW_UNTESTED = "DSP_PLUGIN_ALLOW_UNTESTED"
_RECORDS = "_dsp_plugin_patches"
_ABSENT = object()
# Of wrappers around wrappers, as many as are looked into for ours.
_WRAPPERS = 6
_MANY = 64


@dataclass(frozen=True)
class _Record:
    """What one applied patch put on its owner, and what was there before."""

    before: object
    after: object


@dataclass(frozen=True)
class Patch:
    """Replaces one attribute of an upstream package.

    Attributes:
        name: what the patch is for, as shown to users.
        target: ``"package.module:attribute.path"``.
        distribution: the installed distribution whose version decides (``"megatron-core"``).
        supported: version specifiers of that distribution, such as ``">=0.16,<0.20"``.
        make: called with the upstream attribute, returns what replaces it. For an attribute that a class holds as a
            descriptor (property, staticmethod), `make` gets the descriptor itself. With `creates`, it is called with
            None.
        parameters: names that the upstream callable must accept, because the replacement relies on them.
        creates: the target must not exist upstream; the patch adds it.
        tested: the newest version that it was tried with; a newer one that is supported is named in a warning.
    """

    name: str
    target: str
    distribution: str
    supported: str
    make: Callable[[Any], Any] = field(repr=False)
    parameters: tuple[str, ...] = ()
    creates: bool = False
    tested: str | None = None

    def verify(self) -> None:
        """Checks version, target and signature; changes nothing.

        Raises:
            PatchError: the distribution is absent or its version unsupported, the target is missing (or, with
                `creates`, taken), or its signature lacks a parameter that the patch relies on.
        """
        if self.applied:
            return
        self._verify_version()
        owner, attribute = self._resolve()
        current = inspect.getattr_static(owner, attribute, _ABSENT)
        if self.creates:
            if current is not _ABSENT:
                raise self._refusal(f"{self.target} already exists upstream")
            return
        if current is _ABSENT:
            raise self._refusal(f"{self.target} does not exist")
        if self.parameters:
            self._verify_signature(getattr(owner, attribute))

    def apply(self) -> None:
        """Verifies, then replaces the target. Does nothing where it is already applied.

        Raises:
            PatchError: see `verify`.
        """
        if self.applied:
            return
        self.verify()
        owner, attribute = self._resolve()
        own = attribute in vars(owner)
        before = inspect.getattr_static(owner, attribute, _ABSENT)
        after = self.make(None if self.creates else before)
        if _RECORDS not in vars(owner):
            setattr(owner, _RECORDS, {})
        vars(owner)[_RECORDS][self._key(attribute)] = _Record(before if own else _ABSENT, after)
        setattr(owner, attribute, after)

    def revert(self) -> None:
        """Puts the upstream attribute back. Does nothing where the patch is not applied.

        Raises:
            PatchError: something else has replaced the target since.
        """
        found = self._record()
        if found is None:
            return
        owner, attribute, record = found
        if not self.applied:
            # Somebody put another in its place, as a reload does: there is nothing of ours to undo.
            del vars(owner)[_RECORDS][self._key(attribute)]
            return
        if vars(owner).get(attribute, _ABSENT) is not record.after:
            raise self._covered("")
        del vars(owner)[_RECORDS][self._key(attribute)]
        if record.before is _ABSENT:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, record.before)

    @property
    def applied(self) -> bool:
        """Whether the target carries this patch now, by itself or inside what has wrapped it since."""
        found = self._record()
        if found is None:
            return False
        owner, attribute, record = found
        return _leads_to(inspect.getattr_static(owner, attribute, _ABSENT), record.after)

    def __enter__(self) -> Patch:
        self.apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()

    def _record(self) -> tuple[Any, str, _Record] | None:
        """Owner, attribute and record, of a patch that has been made at some time."""
        try:
            owner, attribute = self._resolve()
        except PatchError:
            return None
        record = vars(owner).get(_RECORDS, {}).get(self._key(attribute))
        return None if record is None else (owner, attribute, record)

    def _covered(self, more: str) -> PatchError:
        return PatchError(
            f"patch '{self.name}' cannot be reverted: {self.target} was replaced again by something else after it"
            f"{more}. Revert the later change first."
        )

    def _key(self, attribute: str) -> tuple[str, str]:
        return attribute, self.name

    def _resolve(self) -> tuple[object, str]:
        module_name, _, path = self.target.partition(":")
        assert path, f"patch target '{self.target}' is not 'module:attribute'"
        *owners, attribute = path.split(".")
        try:
            owner: object = importlib.import_module(module_name)
            for name in owners:
                owner = getattr(owner, name)
        except (ImportError, AttributeError) as error:
            raise self._refusal(f"{self.target} cannot be reached ({error})") from error
        return owner, attribute

    def _verify_version(self) -> None:
        version = self.version
        if version is None:
            raise PatchError(
                f"patch '{self.name}' needs {self.distribution} {self.supported}, which is not installed. "
                f"Install it: pip install '{self.distribution}{self.supported}'."
            )
        if SpecifierSet(self.supported).contains(version, prereleases=True):
            self._warn_of(version)
            return
        if os.environ.get(ALLOW_UNTESTED) == "1":
            return
        raise PatchError(
            f"{self.distribution} {version} is not supported by patch '{self.name}' (of {self.target}), which is for "
            f"{self.supported}; nothing was patched. Install a supported version (pip install "
            f"'{self.distribution}{self.supported}'), or set {ALLOW_UNTESTED}=1 to skip this version check; signatures "
            "are checked all the same."
        )

    def _warn_of(self, version: str) -> None:
        """One line for all patches of a distribution: Python shows equal warnings of one place once."""
        if self.tested is not None and Version(version).release[:2] > Version(self.tested).release[:2]:
            warnings.warn(
                f"{self.distribution} {version} is newer than {self.tested}, the last that dsp_plugin was tested with",
                RuntimeWarning,
                stacklevel=1,
            )

    def _verify_signature(self, upstream: object) -> None:
        if not callable(upstream):
            raise self._refusal(f"{self.target} is not callable but {type(upstream).__name__}")
        present = inspect.signature(cast(Callable[..., object], upstream)).parameters
        missing = [name for name in self.parameters if name not in present]
        if missing:
            raise self._refusal(f"{self.target} has no parameter {', '.join(missing)} (it has: {', '.join(present)})")

    def _refusal(self, why: str) -> PatchError:
        return PatchError(
            f"patch '{self.name}' does not fit {self.distribution} {self.version or '(not installed)'}: {why}; "
            f"nothing was patched. Install a version in {self.supported}, or report this version."
        )

    @property
    def version(self) -> str | None:
        """That of the distribution as it is used: installed, or a checkout that is imported in its place."""
        checkout = self._checkout_version()
        if checkout is not None:
            return checkout
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return None

    def _checkout_version(self) -> str | None:
        """The version of a checkout beside the user's script that was imported in place of what is installed."""
        imported = sys.modules.get(self.distribution.replace("-", "."))
        source = getattr(imported, "__file__", None)
        if source is None:
            return None
        try:
            home = str(metadata.distribution(self.distribution).locate_file(""))
        except metadata.PackageNotFoundError:
            home = None
        if home is not None and Path(source).resolve().is_relative_to(Path(home).resolve()):
            return None
        version = getattr(imported, "__version__", None)
        return None if version is None else str(version)


@dataclass(frozen=True)
class PatchSet:
    """Patches that only make sense together: all are applied, or none.

    Attributes:
        name: what the set is for.
        patches: applied in this order, reverted in the opposite one.
    """

    name: str
    patches: tuple[Patch, ...]

    def verify(self) -> None:
        """Verifies every patch; changes nothing.

        Raises:
            PatchError: the first that does not fit.
        """
        for patch in self.patches:
            patch.verify()

    def apply(self) -> None:
        """Verifies every patch, then applies each; a failure half way reverts those that this call applied.

        Raises:
            PatchError: a patch does not fit; nothing is left patched by this call.
        """
        self.verify()
        done: list[Patch] = []
        try:
            for patch in self.patches:
                if not patch.applied:
                    patch.apply()
                    done.append(patch)
        except BaseException:
            for patch in reversed(done):
                patch.revert()
            raise

    def revert(self) -> None:
        """Reverts every applied patch, last first, or none.

        Raises:
            PatchError: something else has wrapped a target since; nothing is reverted then.
        """
        left: dict[tuple[int, str], object] = {}
        for patch in reversed(self.patches):
            found = patch._record()
            if found is None or not patch.applied:
                continue
            owner, attribute, record = found
            place = id(owner), attribute
            if left.get(place, vars(owner).get(attribute, _ABSENT)) is not record.after:
                raise patch._covered(f", so nothing of '{self.name}' was")
            left[place] = record.before
        for patch in reversed(self.patches):
            patch.revert()

    @property
    def applied(self) -> bool:
        """Whether every patch of the set is applied now."""
        return all(patch.applied for patch in self.patches)

    def __iter__(self) -> Iterator[Patch]:
        return iter(self.patches)

    def __enter__(self) -> PatchSet:
        self.apply()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()


def _leads_to(current: object, wanted: object) -> bool:
    """Whether ``current`` is ``wanted`` or holds it somewhere, as every wrapper has to hold what it calls."""
    seen: set[int] = set()
    layer = [current]
    for depth in range(_WRAPPERS):
        if any(held is wanted for held in layer):
            return True
        seen.update(map(id, layer))
        # The globals of what a wrapper calls in turn would lead through the whole package.
        layer = [held for holder in layer for held in _held(holder, depth < 2) if id(held) not in seen]
    return False


def _held(holder: object, with_globals: bool) -> Iterator[object]:
    """The callables, descriptors and small collections that something has at hand."""
    found: list[object] = []
    match holder:
        case FunctionType():
            for cell in holder.__closure__ or ():
                with suppress(ValueError):  # An empty one.
                    found.append(cell.cell_contents)
            found += [*(holder.__defaults__ or ()), *(holder.__kwdefaults__ or {}).values(), *vars(holder).values()]
            if with_globals:
                found += [holder.__globals__.get(name) for name in holder.__code__.co_names]
        case staticmethod() | classmethod() | MethodType():
            found.append(holder.__func__)
        case functools.partial():
            found += [holder.func, *holder.args, *holder.keywords.values()]
        case property():
            found += [holder.fget, holder.fset, holder.fdel]
        case list() | tuple():
            found += holder
        case dict():
            found += holder.values()
        case type() | ModuleType():
            pass
        case _:
            found += getattr(holder, "__dict__", {}).values()
    for held in found:
        small = isinstance(held, list | tuple | dict) and len(held) < _MANY
        if small or callable(held) or isinstance(held, staticmethod | classmethod | property):
            yield held


def applied_in_words(patches: Iterable[Patch]) -> str:
    """How many of the patches are applied, by distribution, such as ``deepspeed 0.19.8 (14 patches)``."""
    counts: dict[str, int] = {}
    for patch in patches:
        if patch.applied:
            name = f"{patch.distribution} {patch.version}"
            counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} ({count} patch{'es' if count > 1 else ''})" for name, count in counts.items())
