"""Which Megatron-core runs a case: one of these marks, on the case, its test or its module.

Without ``--matrix``, of those that we test with: `NEWEST` or `OLDEST` alone, `EVERY` one, or none for
`pytest.mark.matrix`. A case without a mark means `EVERY`; a table of cases names one in each row. The mark that is
nearest to the case counts. `needs` and `until` are for what another Megatron-core could not run at all.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

CONSTRAINTS = Path(__file__).parents[1] / "configs" / "constraints"

EVERY, NEWEST, OLDEST = map(pytest.mark.core, ("every", "newest", "oldest"))


@cache
def tested_ends() -> dict[str, Version]:
    """The newest and the oldest that we test with."""
    pins = (re.search(r"^megatron-core==(\S+)$", path.read_text(), re.M) for path in CONSTRAINTS.glob("py*.txt"))
    tested = [Version(pin[1]) for pin in pins if pin]
    return {"newest": max(tested), "oldest": min(tested)}


@cache
def installed() -> Version | None:
    """The Megatron-core of this environment."""
    try:
        return Version(metadata.version("megatron-core"))
    except metadata.PackageNotFoundError:
        return None


def left_to_another(item: pytest.Item) -> bool:
    """Whether the other end of what we test with runs this case; any version between them runs all."""
    mark, here = item.get_closest_marker("core"), installed()
    if mark is None or here is None:
        return False
    ends = tested_ends()
    if here >= ends["newest"]:
        return mark.args == ("oldest",)
    return here <= ends["oldest"] and mark.args == ("newest",)


def has(module: str) -> bool:
    """Whether a Megatron-core is installed that has this module."""
    return find_spec("megatron") is not None and find_spec(module) is not None


def needs(module: str, reason: str) -> pytest.MarkDecorator:
    """Skips where the Megatron-core has no such module; where there is none at all, that is the reason to give."""
    return pytest.mark.skipif(find_spec("megatron") is not None and not has(module), reason=reason)


def until(version: str, reason: str) -> pytest.MarkDecorator:
    """Skips from this version on."""
    here = installed()
    return pytest.mark.skipif(here is not None and here >= Version(version), reason=reason)


def needs_training() -> pytest.MarkDecorator:
    """For what runs Megatron's own training loop."""
    return needs("megatron.training", "this megatron-core is core only; its wheel ships megatron.training from 0.17 on")
