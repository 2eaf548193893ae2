"""What of `hf_compiled` is beyond the covering subset."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hf_compiled import MATRIX, train


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    return {f"compiled-{name}": partial(train, name, folder) for name in MATRIX}
