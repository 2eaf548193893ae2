"""Where a verification runs: on ranks spawned on this machine, or on the world that torchrun has started."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.integers import integer_of
from dsp_plugin.spawn import spawn
from dsp_plugin.verification.cases import Case
from dsp_plugin.verification.engine import run_cases
from dsp_plugin.verification.report import CaseResult


def launched() -> bool:
    """Whether a launcher has made this process a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def speaks() -> bool:
    """Whether this process is the one that prints."""
    return not launched() or os.environ["RANK"] == "0"


def device_kind(size: int) -> str:
    """``cuda`` where there is a device for each rank on this machine, else ``cpu``."""
    here = integer_of("LOCAL_WORLD_SIZE", size) if launched() else size
    return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= here else "cpu"


def check_world(config: SequenceParallelConfig) -> None:
    """Check the size against the launched world, if there is one, before anything is sent.

    Raises:
        SequenceParallelConfigError: it does not divide it.
    """
    if launched():
        config.check_world(integer_of("WORLD_SIZE", 1))


def verify_cases(cases: Sequence[Case], timeout: float) -> list[CaseResult]:
    """Run the cases, all of one method and size, with a progress bar on a terminal.

    Args:
        timeout: seconds after which spawned ranks are given up; in a launched world, after which a collective is.

    Raises:
        RankFailure: a spawned rank raised, died or hung.
    """
    assert cases
    with _progress(len(cases)) as advance:
        if launched():
            return _in_launched_world(cases, timeout, advance)
        with tempfile.NamedTemporaryFile() as ticks, _following(Path(ticks.name), advance):
            return spawn(_on_spawned_rank, cases[0].size, cases, ticks.name, timeout=timeout)[0]


def _in_launched_world(cases: Sequence[Case], timeout: float, advance: Callable[[], None]) -> list[CaseResult]:
    on_cuda = device_kind(cases[0].size) == "cuda"
    if on_cuda:
        torch.cuda.set_device(integer_of("LOCAL_RANK", 0, least=0))
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(seconds=timeout))
    results = run_cases(cases, advance)
    dist.destroy_process_group()
    return results


def _on_spawned_rank(cases: Sequence[Case], ticks: str) -> list[CaseResult]:
    if dist.get_rank() != 0:
        return run_cases(cases)
    with open(ticks, "ab", buffering=0) as file:
        return run_cases(cases, lambda: _tick(file.write))


def _tick(write: Callable[[bytes], int]) -> None:
    write(b".")


@contextmanager
def _following(ticks: Path, advance: Callable[[], None]) -> Iterator[None]:
    """Advance by as many steps as the file grows in bytes, which is how rank 0 tells how far it is."""
    over = threading.Event()

    def follow() -> None:
        seen = 0
        while not over.wait(0.1):
            size = ticks.stat().st_size
            for _ in range(size - seen):
                advance()
            seen = size

    follower = threading.Thread(target=follow, daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    # On stderr, so that what is printed to a file or a pipe is the result alone.
    with Progress(console=Console(stderr=True), transient=True, disable=not (speaks() and sys.stderr.isatty())) as bar:
        task = bar.add_task("verifying", total=total)
        yield lambda: bar.advance(task)
