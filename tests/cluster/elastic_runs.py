"""Runs of training scripts under torchrun, one rank of which a test kills when a checkpoint is there."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Run:
    """A torchrun, and the file that it and its ranks print to."""

    process: subprocess.Popen[bytes]
    log: Path

    def output(self) -> str:
        """What has been printed."""
        return self.log.read_text(errors="replace")

    def kill_rank(self, rank: int, when: Callable[[Run], bool], seconds: float = 150.0) -> int:
        """Kills a rank with SIGKILL as soon as `when` says so; returns its pid."""
        deadline = time.monotonic() + seconds
        while not when(self):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.002)
        pid = next(pid for pid in children(self.process.pid) if variable(pid, "RANK") == str(rank))
        os.kill(pid, signal.SIGKILL)
        return pid

    def status(self, seconds: float = 200.0) -> int:
        """Of torchrun, once it has ended."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds:g} s:\n{self.output()}") from None


@contextmanager
def torchrun(
    log: Path, nproc: int, script: Path, *argv: str, options: Sequence[str] = ("--standalone",), timeout: float = 60.0
) -> Iterator[Run]:
    """Starts a script under the launcher under torchrun; kills what is left of it at the end.

    Args:
        log: gets the output.
        options: of torchrun.
        timeout: the launcher's.
    """
    command = [sys.executable, "-m", "torch.distributed.run", *options, "--nproc-per-node", str(nproc)]
    command += ["-m", "dsp_plugin.launch", "--cpu", "--timeout", str(timeout), str(script), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(nproc)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True, cwd=log.parent
        )
    ranks: list[int] = []
    try:
        yield Run(process, log)
    finally:
        if process.poll() is None:
            ranks = children(process.pid)
            process.kill()
            process.wait()
        # torchrun gives every rank a session of its own.
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Processes that a process has started and that still run."""
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def variable(pid: int, name: str) -> str | None:
    """A variable of the environment that a process was started with."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for entry in Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"):
            key, _, value = entry.partition("=")
            if key == name:
                return value
    return None


def losses(metrics: Path) -> list[float]:
    """Of every step, as the scripts write them."""
    recorded: list[float] = json.loads(metrics.read_text())["losses"]
    return recorded
