"""Patches: verified before they are made, made once, undone exactly, all of a set or none."""

from __future__ import annotations

import contextlib
import functools
import sys
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest

from dsp_plugin.errors import PatchError
from dsp_plugin.patches.patch import ALLOW_UNTESTED, Patch, PatchSet

NAME = "throwaway_upstream"


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An importable module of a distribution at version 1.4."""
    module = ModuleType(NAME)

    def double(x: int, times: int = 2) -> int:
        return x * times

    class Base:
        def greet(self, name: str) -> str:
            return f"hello {name}"

    class Child(Base):
        @staticmethod
        def make(size: int) -> list[int]:
            return [0] * size

    module.double, module.Base, module.Child = double, Base, Child  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, NAME, module)
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "1.4" if name == NAME else real(name))
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    return module


def patch(target: str = "double", make: Any = None, supported: str = ">=1.2,<2", **settings: Any) -> Patch:
    return Patch(
        settings.pop("name", f"test {target}"),
        f"{NAME}:{target}",
        settings.pop("distribution", NAME),
        supported,
        make or (lambda original: lambda x, times=2: original(x, times) + 1),
        **settings,
    )


def test_applies_and_reverts_exactly(upstream: ModuleType) -> None:
    original = upstream.double
    change = patch(parameters=("x", "times"))
    change.apply()
    assert change.applied
    assert upstream.double(3) == 7
    change.revert()
    assert upstream.double is original
    assert not change.applied


def test_apply_and_revert_are_idempotent_across_equal_patches(upstream: ModuleType) -> None:
    original = upstream.double
    patch().apply()
    patch().apply()
    assert upstream.double(3) == 7
    patch().revert()
    patch().revert()
    assert upstream.double is original


def test_context_manager_reverts_when_the_body_raises(upstream: ModuleType) -> None:
    original = upstream.double
    with contextlib.suppress(ZeroDivisionError), patch():
        assert upstream.double is not original
        raise ZeroDivisionError
    assert upstream.double is original


def test_inherited_attribute_is_removed_again(upstream: ModuleType) -> None:
    change = patch("Child.greet", lambda original: lambda self, name: original(self, name) + "!")
    change.apply()
    assert upstream.Child().greet("you") == "hello you!"
    assert upstream.Base().greet("you") == "hello you"
    change.revert()
    assert "greet" not in vars(upstream.Child)


def test_descriptors_are_kept(upstream: ModuleType) -> None:
    before = vars(upstream.Child)["make"]
    change = patch("Child.make", lambda original: staticmethod(lambda size: [*original.__func__(size), 1]))
    with change:
        assert upstream.Child().make(2) == [0, 0, 1]
    assert vars(upstream.Child)["make"] is before


def test_created_attribute_is_removed_again(upstream: ModuleType) -> None:
    with patch("fresh", lambda nothing: 5, creates=True):
        assert upstream.fresh == 5
    assert not hasattr(upstream, "fresh")


def test_two_patches_of_one_target_stack(upstream: ModuleType) -> None:
    inner, outer = patch(name="inner"), patch(name="outer", make=lambda f: lambda x, times=2: 10 * f(x, times))
    inner.apply()
    outer.apply()
    assert upstream.double(3) == 70
    with pytest.raises(PatchError, match="'inner' cannot be reverted"):
        inner.revert()
    outer.revert()
    inner.revert()
    assert upstream.double(3) == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (patch(supported=">=2"), ["throwaway_upstream 1.4", "test double", ">=2", ALLOW_UNTESTED, "pip install"]),
        (patch(distribution="no-such-distribution"), ["no-such-distribution", "not installed", "pip install"]),
        (patch(parameters=("x", "factor")), ["throwaway_upstream 1.4", "no parameter factor", "it has: x, times"]),
        (patch("triple"), ["throwaway_upstream:triple", "does not exist"]),
        (patch("Missing.method"), ["throwaway_upstream:Missing.method", "cannot be reached"]),
        (patch("double", creates=True), ["already exists"]),
    ],
    ids=["version", "absent", "signature", "target", "owner", "taken"],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(
    upstream: ModuleType, change: Patch, words: list[str]
) -> None:
    before = dict(vars(upstream))
    with pytest.raises(PatchError) as error:
        change.apply()
    assert all(word in str(error.value) for word in words), str(error.value)
    assert dict(vars(upstream)) == before


def test_untested_versions_can_be_allowed_but_not_other_signatures(
    upstream: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    with patch(supported=">=2"):
        assert upstream.double(3) == 7
    with pytest.raises(PatchError, match="no parameter factor"):
        patch(supported=">=2", parameters=("factor",)).apply()


def test_pre_release_counts_as_before_its_release(upstream: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1.2.0rc1")
    with pytest.raises(PatchError, match=r"1\.2\.0rc1"):
        patch(supported=">=1.2").verify()
    patch(supported=">=1.2.0rc0").verify()


def test_set_is_not_started_when_one_patch_does_not_fit(upstream: ModuleType) -> None:
    original = upstream.double
    with pytest.raises(PatchError, match="triple"):
        PatchSet("both", (patch(), patch("triple"))).apply()
    assert upstream.double is original


def test_set_is_undone_when_one_patch_fails_half_way(upstream: ModuleType) -> None:
    def explode(original: object) -> object:
        raise ZeroDivisionError

    kept = patch(name="kept")
    kept.apply()
    with pytest.raises(ZeroDivisionError):
        PatchSet(
            "three", (kept, patch("Base.greet", lambda f: lambda self, name: ""), patch("Child.make", explode))
        ).apply()
    assert kept.applied, "a patch that was applied before the set must survive its failure"
    assert upstream.Base().greet("you") == "hello you"


def test_set_applies_and_reverts_as_one(upstream: ModuleType) -> None:
    both = PatchSet("both", (patch(), patch("fresh", lambda nothing: 5, creates=True)))
    with both:
        assert both.applied
        assert (upstream.double(3), upstream.fresh) == (7, 5)
    assert not both.applied
    assert upstream.double(3) == 6


def by_closure(f: Any) -> Any:
    return lambda x, times=2: 100 + f(x, times)


def by_wraps(f: Any) -> Any:
    @functools.wraps(f)
    def wrapper(*args: Any) -> Any:
        return 100 + wrapper.__wrapped__(*args)  # type: ignore[attr-defined]

    return wrapper


class ByObject:
    def __init__(self, f: Any) -> None:
        self.kept = {"f": [f]}

    def __call__(self, *args: Any) -> Any:
        return 100 + self.kept["f"][0](*args)


def by_default(f: Any) -> Any:
    return lambda x, f=f: 100 + f(x)


def by_global(f: Any) -> Any:
    space = {"original": f}
    exec("def wrapper(x):\n    return 100 + original(x)", space)
    return space["wrapper"]


WRAPPERS = [by_closure, by_wraps, ByObject, by_default, by_global, lambda f: functools.partial(by_closure(f), times=2)]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_patch_inside_a_foreign_wrapper_still_stands_and_is_not_made_twice(upstream: ModuleType, wrap: Any) -> None:
    change = patch()
    change.apply()
    upstream.double = wrap(upstream.double)
    assert change.applied
    change.apply()
    assert upstream.double(3) == 107
    with pytest.raises(PatchError, match="replaced again by something else"):
        change.revert()
    assert change.applied


def test_a_patch_that_a_reload_has_undone_is_not_applied_and_can_be_made_again(upstream: ModuleType) -> None:
    def fresh(x: int, times: int = 2) -> int:
        return x * times

    change, other = patch(), patch(name="other", make=lambda f: lambda x, times=2: 10 * f(x, times))
    change.apply()
    other.apply()
    upstream.double = fresh
    assert not change.applied
    assert not other.applied
    other.revert()
    assert upstream.double is fresh
    PatchSet("both", (change, other)).apply()
    assert upstream.double(3) == 70
    PatchSet("both", (change, other)).revert()
    assert upstream.double is fresh


def test_set_reverts_nothing_where_one_patch_cannot_be(upstream: ModuleType) -> None:
    both = PatchSet(
        "both",
        (
            patch(),
            patch("Base.greet", lambda f: lambda self, name: "", name="inner"),
            patch("Base.greet", lambda f: lambda self, name: f(self, name) + ".", name="outer"),
            patch("fresh", lambda nothing: 5, creates=True),
        ),
    )
    both.apply()
    patched = upstream.double
    upstream.double = by_closure(patched)
    with pytest.raises(PatchError, match=r"'test double' cannot be reverted.*nothing of 'both' was.*Revert the later"):
        both.revert()
    assert both.applied
    assert upstream.fresh == 5
    assert upstream.Base().greet("you") == "."
    upstream.double = patched
    both.revert()
    assert not any(change.applied for change in both)
    assert upstream.Base().greet("you") == "hello you"
    assert not hasattr(upstream, "fresh")
