"""Wrong configurations are refused on every rank, by a message that says what to do, and no rank hangs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from deepspeed_refused import REFUSED


def names() -> Iterator[Any]:
    """A parameter set for every refusal, with its cell if it holds one."""
    for name, refused in REFUSED.items():
        marks = []
        if refused.cell is not None:
            method, feature, reason = refused.cell
            marks.append(pytest.mark.cell("deepspeed", method, feature, status="refused", reason=reason))
        yield pytest.param(name, id=name, marks=marks)


@pytest.mark.parametrize("name", list(names()))
def test_refused(name: str, world: Callable[[int], Any]) -> None:
    """The same error on all ranks."""
    results = world(4).results(f"refused_{name}")
    expected = REFUSED[name]
    for result in results:
        assert result["error"] == expected.error, result["message"]
        assert all(fragment in result["message"] for fragment in expected.says), result["message"]
        assert result["message"] == results[0]["message"]
        assert result["still_usable"]
