"""How a benchmark tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Advance = Callable[[str], None]
"""Called before each measurement, with its name."""
