"""What a step cost besides bytes: tokens, the work of attention, and time that computation waited for communication.

Counted only while a meter is open. Like ledgers, open meters are process-wide: backward passes run on other threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Meter:
    """Sums since it was opened or last cleared.

    Attributes:
        tokens: of the whole sequences that this rank and its peers worked on together.
        attention_flops: floating point operations of softmax attention's forward passes on this rank.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts from 0."""
        self.tokens = self.attention_flops = 0
        self._host_seconds = self._device_seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def fold(self) -> None:
        """Adds up the events that a device is done with, so that they do not pile up; waits for none."""
        with _lock:
            done = next((place for place, (_, end) in enumerate(self._events) if not end.query()), len(self._events))
            past, self._events = self._events[:done], self._events[done:]
        self._device_seconds += sum(start.elapsed_time(end) for start, end in past) / 1000

    def waited(self) -> float:
        """Seconds that computation stood still for communication.

        On CPU the time that the calling thread spent in collectives and waits; on CUDA the time that the stream did,
        for which this call waits.
        """
        for _, end in self._events:
            end.synchronize()
        self.fold()
        return self._host_seconds + self._device_seconds


_open: list[Meter] = []
_lock = threading.Lock()


@contextmanager
def meter(opened: Meter | None = None) -> Iterator[Meter]:
    """Open a meter, a new one by default, for the block."""
    opened = Meter() if opened is None else opened
    _open.append(opened)
    try:
        yield opened
    finally:
        _open.remove(opened)


def metering() -> bool:
    """Whether anybody wants to know."""
    return bool(_open)


def count(*, tokens: int = 0, attention_flops: int = 0) -> None:
    """Adds to every open meter."""
    with _lock:
        for each in _open:
            each.tokens += tokens
            each.attention_flops += attention_flops


@contextmanager
def waiting(on_cuda: bool) -> Iterator[None]:
    """Counts what the block takes as waiting for communication."""
    if not _open:
        yield
        return
    if on_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        yield
        end.record()
        with _lock:
            for each in _open:
                each._events.append((start, end))
        return
    begun = time.perf_counter()
    yield
    seconds = time.perf_counter() - begun
    with _lock:
        for each in _open:
            each._host_seconds += seconds
