"""Ranks that stay between runs of Megatron scripts: starting torch and Megatron costs far more than a small run does.

One process (`main`) imports everything once and forks ranks on request. A rank runs one script after another as
`python -m dsp_plugin.launch --cpu SCRIPT ARGS` would under torchrun, each in a world of torch.distributed of its own
that the script makes and destroys. A world whose run failed or hung is killed, and the next run gets a fresh one.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import io
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

# Imports of a package that a script may import again: what it replaces in there must not reach the next script.
SCRIPTS = "dsp_plugin.launch.examples.pretrain"
# Whoever still holds a destroyed group holds gloo's threads: after many runs they are what a rank is busy with.
RUNS = 8


class RunFailure(AssertionError):  # noqa: N818
    """A rank raised, died or hung; the message has the end of what every rank printed, and tracebacks or stacks."""


@dataclass
class World:
    """Ranks that wait for the next script."""

    folder: Path
    left: int
    connections: list[Connection]
    pids: list[int]

    def run(self, script: Path, argv: Sequence[str], timeout: float) -> list[str]:
        """Runs a script on all ranks; returns what each printed.

        Raises:
            RunFailure: it did not end well within `timeout` seconds. The ranks are gone then.
        """
        order = {"script": str(script), "argv": list(argv), "port": free_port(), "timeout": timeout}
        self.left -= 1
        for connection in self.connections:
            connection.send(order)
        answers: dict[int, tuple[bool, str]] = {}
        waiting = {connection: rank for rank, connection in enumerate(self.connections)}
        deadline = time.monotonic() + timeout
        while waiting and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(waiting), left):
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    answers[rank] = connection.recv()
                except EOFError:
                    answers[rank] = (False, "died without a word")
                if not answers[rank][0]:
                    # The others may be about to fail alike, or wait for this one for ever.
                    deadline = min(deadline, time.monotonic() + 5)
        if not waiting and all(well for well, _ in answers.values()):
            if not self.left:
                self.kill()
            return [answers[rank][1] for rank in range(len(answers))]
        for rank in waiting.values():
            answers[rank] = (False, self._stacks(rank))
        self.kill()
        raise RunFailure(
            f"{script.name} {' '.join(argv)}\n"
            + "\n".join(
                f"--- rank {rank}\n{text[-8000:]}" for rank, (well, text) in sorted(answers.items()) if not well
            )
        )

    def _stacks(self, rank: int) -> str:
        """What faulthandler of a rank that hangs writes when it is told to abort."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], signal.SIGABRT)
        time.sleep(1)
        path = stack_file(self.folder, self.pids[rank])
        return "still running\n" + (path.read_text() if path.exists() else "")

    def kill(self) -> None:
        """Ends all ranks."""
        for pid, connection in zip(self.pids, self.connections, strict=True):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            connection.close()
        self.pids, self.connections = [], []


class Worlds:
    """The worlds of a test session, by size."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="standing-world-")
        address = f"{self._folder.name}/socket"
        self._listener = Listener(address, "AF_UNIX", backlog=64)
        self._origin = subprocess.Popen(
            [sys.executable, __file__, address],
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith("DSP_PLUGIN_")},
                "OMP_NUM_THREADS": "1",
                "PYTHONWARNINGS": "ignore",
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            },
            start_new_session=True,
        )
        atexit.register(self.close)
        self._control = self._listener.accept()
        self._worlds: dict[int, World] = {}

    def run(self, ranks: int, script: Path, argv: Sequence[str], timeout: float) -> list[str]:
        """Runs a script on a world of `ranks`; see `World.run`."""
        world = self._worlds.get(ranks)
        if world is None or not world.pids:
            world = self._worlds[ranks] = self._fork(ranks)
        return world.run(script, argv, timeout)

    def _fork(self, ranks: int) -> World:
        # Memory of a small machine does not hold the idle ranks of every size.
        for other in self._worlds.values():
            if len(other.pids) > 1:
                other.kill()
        self._control.send(ranks)
        found: dict[int, tuple[int, Connection]] = {}
        while len(found) < ranks:
            connection = self._listener.accept()
            rank, pid = connection.recv()
            found[rank] = (pid, connection)
        pids, connections = zip(*(found[rank] for rank in range(ranks)), strict=True)
        return World(Path(self._folder.name), RUNS, list(connections), list(pids))

    def close(self) -> None:
        """Ends every process."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._origin.pid, signal.SIGKILL)
        self._origin.wait()
        self._listener.close()
        self._folder.cleanup()


def free_port() -> int:
    """A TCP port that nobody listens on now, out of the range from which the kernel takes those of connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def stack_file(folder: Path, pid: int) -> Path:
    """Where a rank writes its stacks."""
    return folder / f"stacks-{pid}.txt"


def main(address: str) -> None:
    """Imports what all scripts share, then forks ranks until the session ends."""
    from dsp_plugin.patches import cpu

    cpu.install()
    import megatron.core.distributed
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control = Client(address, "AF_UNIX")
    with contextlib.suppress(EOFError):
        while True:
            ranks = control.recv()
            for rank in range(ranks):
                if os.fork() == 0:
                    control.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    serve(address, rank, ranks)


def serve(address: str, rank: int, ranks: int) -> None:
    """A rank: runs scripts until the session hangs up; never returns."""
    stacks = stack_file(Path(address).parent, os.getpid()).open("w")
    faulthandler.enable(stacks)
    connection = Client(address, "AF_UNIX")
    connection.send((rank, os.getpid()))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    with contextlib.suppress(EOFError, OSError):
        while True:
            order = connection.recv()
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                try:
                    run_script(order)
                    answer = (True, "")
                except BaseException:
                    answer = (False, traceback.format_exc())
            connection.send((answer[0], printed.getvalue() + answer[1]))
    os._exit(0)


def run_script(order: dict[str, Any]) -> None:
    """What the launcher does for one script, and undoes for the next."""
    import torch.distributed as dist

    from dsp_plugin.launch.__main__ import Command, prepare
    from dsp_plugin.patches import megatron

    os.environ["MASTER_PORT"] = str(order["port"])
    command = Command.parse(["--cpu", order["script"], *order["argv"]])
    path, arguments = sys.path[0], sys.argv
    try:
        prepare(command)
        runpy.run_path(command.script, run_name="__main__")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        megatron.uninstall()
        sys.path[0], sys.argv = path, arguments
        for name in [name for name in sys.modules if name.startswith(SCRIPTS)]:
            del sys.modules[name]
            # `from package import module` takes what the package has under that name first.
            package, _, module = name.rpartition(".")
            vars(sys.modules[package]).pop(module, None)


if __name__ == "__main__":
    main(sys.argv[1])
