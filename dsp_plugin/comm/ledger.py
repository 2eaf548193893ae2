"""Every byte that leaves this rank, by method, collective, group and phase.

`record` is called at one place, the choke point in `dsp_plugin.comm.wire`. Open ledgers are process-wide rather than
per thread, because autograd runs backward collectives on threads of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

Phase = Literal["forward", "backward"]


AGREEMENT = "agreement"
"""The method under which ranks tell each other that they go on (`dsp_plugin.comm.consent`): what the first pass of a
kind sends beside what its methods do."""
COMPARISON = "comparison"
"""That under which they compare what they must have alike, in the first passes of a run."""
ASIDE = (AGREEMENT, COMPARISON)
"""What is sent beside what a step sends, by these methods; not part of any total."""


class LedgerRow(NamedTuple):
    """What one kind of traffic added up to: ``bytes`` leaving this rank, in ``calls`` collectives."""

    method: str
    collective: str
    group: str
    phase: Phase
    bytes: int
    calls: int


@dataclass(frozen=True)
class _Kind:
    method: str
    collective: str
    group: str
    phase: Phase


class Ledger:
    """Bytes and calls recorded while it was open."""

    def __init__(self) -> None:
        self._totals: dict[_Kind, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def add(self, method: str, collective: str, group: str, phase: Phase, nbytes: int) -> None:
        """Count one collective that sent ``nbytes`` from this rank."""
        kind = _Kind(method, collective, group, phase)
        with self._lock:
            total, calls = self._totals.get(kind, (0, 0))
            self._totals[kind] = (total + nbytes, calls + 1)

    def rows(self) -> list[LedgerRow]:
        """One row per kind of traffic, sorted by its names."""
        with self._lock:
            rows = [
                LedgerRow(kind.method, kind.collective, kind.group, kind.phase, total, calls)
                for kind, (total, calls) in self._totals.items()
            ]
        return sorted(rows)

    def bytes(
        self,
        *,
        method: str | None = None,
        collective: str | None = None,
        group: str | None = None,
        phase: Phase | None = None,
    ) -> int:
        """Bytes that left this rank, of the rows that match every name given; `ASIDE` only by its names."""
        return sum(row.bytes for row in self._matching(method, collective, group, phase))

    def calls(
        self,
        *,
        method: str | None = None,
        collective: str | None = None,
        group: str | None = None,
        phase: Phase | None = None,
    ) -> int:
        """Collectives entered, of the rows that match every name given; `ASIDE` only by its names."""
        return sum(row.calls for row in self._matching(method, collective, group, phase))

    def _matching(
        self, method: str | None, collective: str | None, group: str | None, phase: Phase | None
    ) -> list[LedgerRow]:
        wanted = (method, collective, group, phase)
        rows = [row for row in self.rows() if row.method not in ASIDE or method == row.method]
        return [row for row in rows if all(w is None or w == got for w, got in zip(wanted, row, strict=False))]


_open: list[Ledger] = []


@contextmanager
def ledger(log: Ledger | None = None) -> Iterator[Ledger]:
    """Open a ledger, a new one by default, for the block; ledgers nest, and each sees all traffic while it is open."""
    log = Ledger() if log is None else log
    _open.append(log)
    try:
        yield log
    finally:
        _open.remove(log)


def record(method: str, collective: str, group: str, phase: Phase, nbytes: int) -> None:
    """Count one collective in every open ledger."""
    for log in _open:
        log.add(method, collective, group, phase, nbytes)
