"""Models and batches that cannot be sharded are refused on every rank, before any collective, with the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hf_refused import REFUSED


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, hf_world: Callable[[int], Any]) -> None:
    """The same error on all ranks, when the model is given or when the batch is."""
    results = hf_world(2).results(f"refused_{name}")
    expected = REFUSED[name]
    for result in results:
        assert result["error"] == expected.error, result["message"]
        assert all(fragment in result["message"] for fragment in expected.says), result["message"]
        assert result["message"] == results[0]["message"]
        assert result["at"] == ("forward" if expected.call else "initialize")
        assert result["still_usable"]
