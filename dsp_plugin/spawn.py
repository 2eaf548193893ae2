"""Ranks as processes on this machine: for `dsp-plugin verify` and for the tests."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dsp_plugin.comm.agreement import hint

Result = TypeVar("Result")

PRELOADED = ["torch", "dsp_plugin"]
"""What the server that CPU ranks are forked from imports when it starts, with the first rank."""


class RankFailure(RuntimeError):  # noqa: N818
    """A rank raised, died or hung; the message has the traceback, or the stacks, of every rank concerned.

    Attributes:
        errors: exceptions by rank, of the ranks that raised.
    """

    def __init__(self, message: str, errors: dict[int, BaseException]) -> None:
        super().__init__(message)
        self.errors = errors


def spawn(worker: Callable[..., Result], size: int, *args: Any, timeout: float = 60.0) -> list[Result]:
    """Run ``worker(*args)`` on ``size`` ranks of a fresh world, each a process of one thread.

    CUDA and NCCL where there is a device for each rank, else CPU and gloo.

    Args:
        worker: importable; what it returns is pickled.
        timeout: seconds after which ranks that are still running are shown, by their stacks, and killed.

    Returns:
        The results by rank.

    Raises:
        RankFailure: any rank raised, died or hung.
    """
    # Children of a server that has imported torch start in milliseconds; CUDA cannot be used in a forked child.
    kind = "spawn" if torch.cuda.is_available() else "forkserver"
    context: Any = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        outcomes: dict[int, tuple[str, Any, str]] = {}
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_run_rank, args=(worker, rank, size, args, folder, timeout, theirs), daemon=True
                )
                process.start()
                theirs.close()
                ranks.append((process, ours))
            outcomes = _collect([ours for _, ours in ranks], timeout)
        finally:
            for _, ours in ranks:
                ours.close()
            for rank, (process, _) in enumerate(ranks):
                # Only a rank that has reported is about to end by itself.
                process.join(timeout=2.0 if rank in outcomes else 0.0)
                if process.is_alive():
                    process.kill()
                    process.join()
        for rank, (process, _) in enumerate(ranks):
            if outcomes.get(rank, ("",))[0] == "died":
                how = f"rank {rank} died without a word, {_ending(process.exitcode)}"
                outcomes[rank] = ("error", RuntimeError(how), f"{how}\n{hint()}\n")
        return _results(outcomes, size, Path(folder), timeout)


def _ending(status: int | None) -> str:
    """How a process ended, by its exit status as `multiprocessing` has it."""
    if status is None or status >= 0:
        return "after it had closed its pipe" if status is None else f"with exit status {status}"
    names = {int(known): known.name for known in signal.Signals}
    return f"by {names.get(-status, f'signal {-status}')}"


def _run_rank(
    worker: Callable[..., Any], rank: int, size: int, args: tuple, folder: str, timeout: float, answer: Connection
) -> None:
    torch.set_num_threads(1)
    # Written by a watchdog thread, so that a rank that hangs in a collective still shows where.
    stacks = open(_stack_file(Path(folder), rank), "w")  # noqa: SIM115
    faulthandler.dump_traceback_later(timeout, file=stacks)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size))
    outcome: tuple[str, Any, str]
    try:
        on_cuda = torch.cuda.device_count() >= size
        if on_cuda:
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout + 30),
        )
        outcome = ("result", worker(*args), "")
    except BaseException as error:
        outcome = ("error", error, traceback.format_exc())
    try:
        payload = pickle.dumps(outcome)
        pickle.loads(payload)  # Exceptions whose arguments are not those of their class fail only here.
    except Exception as why:
        kind, value, shown = outcome
        stand_in = RuntimeError(f"rank {rank}: {kind} {type(value).__name__} cannot be pickled: {value} ({why})")
        payload = pickle.dumps(("error", stand_in, shown or f"{stand_in}\n"))
    answer.send_bytes(payload)
    # A rank that ends takes its connections with it, and ranks still at work would report that instead of their own
    # result or mistake. The parent hangs up when it has heard from all.
    with suppress(EOFError, OSError):
        answer.recv_bytes()
    faulthandler.cancel_dump_traceback_later()
    if outcome[0] == "result":
        dist.destroy_process_group()


def _collect(connections: list[Connection], timeout: float) -> dict[int, tuple[str, Any, str]]:
    """Outcomes by rank. After the first failure the others get a moment to report theirs, then are given up."""
    outcomes: dict[int, tuple[str, Any, str]] = {}
    open_ranks = {connection: rank for rank, connection in enumerate(connections)}
    # A margin, so that the ranks' own watchdogs have written their stacks first.
    deadline = time.monotonic() + timeout + 2.0
    while open_ranks and (remaining := deadline - time.monotonic()) > 0:
        for ready in wait(list(open_ranks), timeout=remaining):
            assert isinstance(ready, Connection)
            rank = open_ranks.pop(ready)
            try:
                outcomes[rank] = pickle.loads(ready.recv_bytes())
            except EOFError:
                outcomes[rank] = ("died", None, "")
            if outcomes[rank][0] != "result":
                deadline = min(deadline, time.monotonic() + 3.0)
    return outcomes


def _results(outcomes: dict[int, tuple[str, Any, str]], size: int, folder: Path, timeout: float) -> list[Any]:
    # By rank: which one is heard first differs from run to run.
    errors = {rank: value for rank, (kind, value, _) in sorted(outcomes.items()) if kind == "error"}
    if not errors and len(outcomes) == size:
        return [outcomes[rank][1] for rank in range(size)]
    parts = [f"--- rank {rank}\n{outcomes[rank][2]}" for rank in errors]
    for rank in sorted(set(range(size)) - set(outcomes)):
        stacks = _stack_file(folder, rank)
        shown = stacks.read_text() if stacks.exists() else ""
        parts.append(f"--- rank {rank} still running, limit {timeout:g} s\n{shown}")
    if not errors:
        parts.append(hint())
    raise RankFailure("\n".join(parts), errors)


def _stack_file(folder: Path, rank: int) -> Path:
    return folder / f"stacks-{rank}.txt"
