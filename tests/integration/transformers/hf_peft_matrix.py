"""The adapters beyond the covering subset."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hf_peft import ADAPTED, COVERING, train


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """All of them by name."""
    return {f"peft-{name}": partial(train, name, folder) for name in ADAPTED if name not in COVERING}
