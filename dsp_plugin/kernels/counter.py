"""Counts kernel calls, so that a test can state how often attention ran, and in which direction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Direction = Literal["forward", "backward"]


class Calls:
    """Kernel invocations seen while a `calls` block is open; one per non-empty mask block."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, Direction]] = Counter()

    def of(self, *, kernel: str | None = None, direction: Direction | None = None) -> int:
        """How many invocations match the given kernel name and direction."""
        return sum(
            count for (name, way), count in self.counts.items() if kernel in (None, name) and direction in (None, way)
        )

    @property
    def forward(self) -> int:
        return self.of(direction="forward")

    @property
    def backward(self) -> int:
        return self.of(direction="backward")


_open: list[Calls] = []


@contextmanager
def calls() -> Iterator[Calls]:
    """``with calls() as log:`` counts every kernel call of this process; blocks may nest."""
    log = Calls()
    # Process-wide, not thread-local: autograd runs backward passes on threads of its own.
    _open.append(log)
    try:
        yield log
    finally:
        _open.remove(log)


def record(kernel: str, direction: Direction) -> None:
    """Called once per kernel invocation."""
    for log in _open:
        log.counts[kernel, direction] += 1
