"""The heads beyond the covering subset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_heads import COVERING, HEADED, chosen


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """All of them by name."""
    return chosen(folder, [name for name in HEADED if name not in COVERING])
