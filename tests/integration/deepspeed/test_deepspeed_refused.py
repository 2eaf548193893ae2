"""Wrong configurations are refused on every rank, by a message that says what to do, and no rank hangs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from deepspeed_refused import REFUSED


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, world: Callable[[int], Any]) -> None:
    """The same error on all ranks."""
    results = world(4).results(f"refused_{name}")
    expected = REFUSED[name]
    for result in results:
        assert result["error"] == expected.error, result["message"]
        assert all(fragment in result["message"] for fragment in expected.says), result["message"]
        assert result["message"] == results[0]["message"]
        assert result["still_usable"]
