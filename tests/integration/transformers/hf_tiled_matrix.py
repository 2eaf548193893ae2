"""The runs of `hf_tiled` beyond the covering subset."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hf_tiled import COVERING, TILED, train


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    return {f"tiled-{name}": partial(train, name, folder) for name in TILED if name not in COVERING}
