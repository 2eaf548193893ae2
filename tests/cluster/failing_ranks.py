"""Ranks that a test started by hand, without an agent that would end the others, each under the launcher."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

SCRIPT = Path(__file__).with_name("exchanging_script.py")
PATIENCE = 60.0
"""Seconds for what takes no time on a quiet machine."""


@dataclass
class Ranks:
    """Processes by rank, and the folder that their script and their output go to."""

    folder: Path
    processes: list[BaseProcess]

    def under_way(self) -> None:
        """Waits until every rank has exchanged something."""
        deadline = time.monotonic() + PATIENCE
        while not all((self.folder / f"{rank}.pid").exists() for rank in range(len(self.processes))):
            assert time.monotonic() < deadline, self.outputs()
            time.sleep(0.01)

    def send(self, rank: int, number: signal.Signals) -> None:
        """Sends a signal to a rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def stop(self) -> None:
        """Lets the script end."""
        (self.folder / "stop").touch()

    def statuses(self, *ranks: int, limit: float = PATIENCE) -> list[int | None]:
        """Exit statuses of these ranks, -N for a signal, once they have ended; None for one that has not in time."""
        deadline = time.monotonic() + limit
        for rank in ranks:
            self.processes[rank].join(max(0.0, deadline - time.monotonic()))
        return [self.processes[rank].exitcode for rank in ranks]

    def output(self, rank: int) -> str:
        """What a rank has printed."""
        return (self.folder / f"{rank}.out").read_text()

    def outputs(self) -> str:
        """What all have printed."""
        return "\n".join(f"--- rank {rank}\n{self.output(rank)}" for rank in range(len(self.processes)))


@contextmanager
def ranks(
    folder: Path, size: int, *argv: str, timeout: float, script: Path = SCRIPT, **environment: str
) -> Iterator[Ranks]:
    """Starts the script on so many ranks; kills what is left of them at the end.

    Args:
        folder: for output; the script's first argument.
        argv: its others.
        timeout: the launcher's.
        environment: what the ranks find in theirs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dsp_plugin", "dsp_plugin.launch.__main__"])
    place = {**environment, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    arguments = ["--timeout", str(timeout), str(script), str(folder), *argv]
    started: list[BaseProcess] = []
    try:
        for rank in range(size):
            output = str(folder / f"{rank}.out")
            started.append(context.Process(target=_run, args=({"RANK": str(rank), **place}, arguments, output)))
            started[-1].start()
        yield Ranks(folder, started)
    finally:
        for process in started:
            process.kill()
            process.join()


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _run(place: dict[str, str], arguments: list[str], output: str) -> None:
    os.environ.update(place)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    from dsp_plugin.launch.__main__ import main

    main(arguments)
