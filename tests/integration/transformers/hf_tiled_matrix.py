"""The runs of `hf_tiled` beyond the covering subset."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hf_tiled import COUNTED, COVERING, TILED, train


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """By name."""
    tiled = {f"tiled-{name}": partial(train, name, folder) for name in TILED if name not in COVERING}
    return {**tiled, **{f"whole-{name}": partial(train, name, folder, {}) for name in COUNTED if name not in COVERING}}
