"""Starts ranks as processes of their own, and ends them: none outlives its test."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def environment(world: int, **extra: str) -> dict[str, str]:
    """The environment of DeepSpeed on CPU and gloo, without any rank."""
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "LOCAL_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "DEEPSPEED_TIMEOUT": "2",
        "TOKENIZERS_PARALLELISM": "false",
        **extra,
    }


def run_ranks(command: Sequence[str], world: int, folder: Path, timeout: float) -> list[Path]:
    """Runs `command` once per rank and waits.

    Args:
        command: arguments of this python, the same on every rank.
        folder: gets ``rank0.log``, ...
        timeout: seconds until every rank must dump its stacks (SIGABRT under faulthandler), then is killed.

    Returns:
        The logs.

    Raises:
        AssertionError: a rank failed or did not end; the message has the end of its log.
    """
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    port = str(free_port())
    processes = []
    for rank, log in enumerate(logs):
        place: Mapping[str, str] = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        with log.open("w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-X", "faulthandler", *command],
                    env=environment(world, **place),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
    wait_or_kill(processes, logs, timeout)
    return logs


def run_launcher(command: Sequence[str], world: int, folder: Path, timeout: float, **extra: str) -> Path:
    """Runs one process that starts ranks itself, such as torchrun, and waits; returns its log."""
    log = folder / "launcher.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", *command],
            env=environment(world, **extra),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=folder,
        )
    wait_or_kill([process], [log], timeout)
    return log


def wait_or_kill(processes: list[subprocess.Popen[bytes]], logs: list[Path], timeout: float) -> None:
    """Waits until all have ended; at the timeout, or when one fails, ends the process groups of all."""
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        late = time.monotonic() > deadline
        if late or any(process.returncode for process in processes):
            # SIGABRT makes faulthandler write the stacks of a rank that is still in a collective.
            _signal_groups(processes, signal.SIGABRT)
            time.sleep(2)
            break
        time.sleep(0.1)
    _signal_groups(processes, signal.SIGKILL)
    for process in processes:
        process.wait()
    failed = [
        f"--- {log.name}: exit code {process.returncode}\n{log.read_text()[-4000:]}"
        for process, log in zip(processes, logs, strict=True)
        if process.returncode
    ]
    assert not failed, "\n".join(failed)


def _signal_groups(processes: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
