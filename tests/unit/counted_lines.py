"""What something costs in a unit that no machine changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def lines(run: Callable[[], Any]) -> int:
    """How many lines of Python ``run()`` executes: the same count on every machine."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count
