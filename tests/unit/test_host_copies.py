"""Copies between a CUDA device and the host are in order by events alone, told by streams that only take notes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dsp_plugin import UnsupportedError
from dsp_plugin.training.host_copies import Cuda, HostPool, InPlace

DEVICE = torch.device("cpu")


class Stream:
    """Notes what it is told to."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def wait_stream(self, other: Stream) -> None:
        self.notes.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.notes.append(f"{self.name} records")
        return f"what {self.name} did"

    def wait_event(self, event: str) -> None:
        self.notes.append(f"{self.name} waits for {event}")

    def synchronize(self) -> None:
        self.notes.append(f"the host waits for {self.name}")


class Runtime:
    """Of CUDA; locks memory, or says why not."""

    def __init__(self, notes: list[str]) -> None:
        self.notes, self.refuses = notes, 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.notes.append(f"locks {nbytes}")
        return self.refuses

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.notes.append("unlocks")
        return 0


class Machine:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.computing = Stream("computation", self.notes)
        self.runtime = Runtime(self.notes)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    side = Stream("the side stream", made.notes)

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        made.notes.append(f"on {stream.name}")
        yield
        made.notes.append("copied")

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: made.computing)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made.runtime)
    return made


def test_a_copy_comes_after_what_was_computed_and_before_what_joins_it(machine: Machine) -> None:
    copies = Cuda(DEVICE)
    source, target = torch.arange(4.0), torch.empty(4)
    copy = copies.start(source, target)
    assert torch.equal(source, target)
    assert machine.notes == [
        "the side stream waits for computation",
        "on the side stream",
        "copied",
        "the side stream records",
    ]
    machine.notes.clear()
    copy.join()
    assert machine.notes == ["computation waits for what the side stream did"]


def test_who_computes_on_another_stream_waits_beside_the_one_that_the_memory_is_of(machine: Machine) -> None:
    copy = Cuda(DEVICE).start(torch.arange(4.0), torch.empty(4))
    machine.notes.clear()
    machine.computing = Stream("another", machine.notes)
    copy.join()
    assert machine.notes == [
        "computation waits for what the side stream did",
        "another waits for what the side stream did",
    ]


def test_memory_is_locked_once_and_unlocked_when_nothing_copies(machine: Machine) -> None:
    pool, copies = HostPool(None), Cuda(DEVICE)
    for _ in range(3):
        assert pool.take(5000, copies) is not None
    assert machine.notes == ["locks 8192"]
    assert pool.held == 8192
    del pool
    assert machine.notes == ["locks 8192", "the host waits for the side stream", "unlocks"]


def test_memory_that_cannot_be_locked_is_refused_in_words(machine: Machine) -> None:
    machine.runtime.refuses = 2
    with pytest.raises(UnsupportedError, match=r"8192 more bytes of host memory could not be had.*returned 2"):
        HostPool(None).take(5000, Cuda(DEVICE))


class Plain:
    """Buffers of ordinary memory."""

    moves, page, floor = True, 1, 1

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def start(self, source: Tensor, target: Tensor) -> Any:
        raise AssertionError("nothing is copied here")

    def free_bytes(self) -> int | None:
        return None


def test_an_idle_buffer_serves_what_is_a_little_smaller_and_goes_where_the_limit_needs_room() -> None:
    pool, copies = HostPool(100_000), Plain()
    assert pool.take(50_000, copies) is not None
    assert pool.take(45_000, copies) is not None
    assert pool.made == 1, "the one of 50,000 bytes served"
    assert pool.take(10_000, copies) is not None
    assert (pool.made, pool.held) == (2, 60_000)
    large = pool.take(90_000, copies)
    assert large is not None
    assert pool.held <= 100_000
    assert pool.take(20_000, copies) is None
    del large
    assert pool.used == 0


def test_where_nothing_moves_bytes_are_counted_alone() -> None:
    pool = HostPool(10)
    first = pool.take(7, InPlace())
    assert first is not None
    assert first.buffer is None
    assert pool.take(4, InPlace()) is None
    del first
    assert (pool.used, pool.peak, pool.held) == (0, 7, 0)
