"""Text to train on: the source of Python's standard library, which every machine has."""

from __future__ import annotations

import sysconfig
from pathlib import Path


def read(size: int) -> bytes:
    """Whole files of it, as many as hold `size` bytes."""
    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    return text
