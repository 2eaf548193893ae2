"""A process with a GPU that is not there, to run functions in: what torch believes of devices, it believes for good."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from dsp_plugin.rehearsal.cuda import guard

SERVED = "dsp_plugin.rehearsal.cuda.serve"
# Of imports, on a machine that has other work.
_START_SECONDS = 300.0


class CudaProcess:
    """The process; started by the first call, for all of them, and ended with this one."""

    def __init__(self) -> None:
        self._running: tuple[subprocess.Popen[bytes], Connection] | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> Any:
        """What the function returns there. It, its arguments and what it returns are pickled.

        Raises:
            RuntimeError: the guard cannot be built; or the function raised what cannot be pickled, with the traceback;
                or the process died.
            TimeoutError: it took too long.
            Exception: what the function raised, with the traceback as a note.
        """
        if self._running is None:
            self._running = _started()
        process, connection = self._running
        try:
            connection.send((function, arguments))
            if not connection.poll(timeout):
                raise TimeoutError(f"{function.__name__} has not returned in {timeout:.0f} seconds")
            good, value, trace = connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.stop()
            status = process.wait()
            raise RuntimeError(f"the process of the fake device died in {function.__name__}: status {status}") from None
        except BaseException:
            # It may answer late, to who comes next.
            self.stop()
            raise
        if good:
            return value
        value.add_note(trace)
        raise value

    def stop(self) -> None:
        """End the process, whatever it does."""
        running, self._running = self._running, None
        if running is not None:
            running[1].close()
            running[0].kill()
            running[0].wait()


def _started() -> tuple[subprocess.Popen[bytes], Connection]:
    library = guard.built()
    ours, theirs = Pipe()
    # Neither forked nor `multiprocessing`'s: it would inherit a torch that has looked for devices, or import what this
    # process was started with.
    process = subprocess.Popen(
        [sys.executable, guard.__file__, str(library), SERVED, str(library), str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )
    theirs.close()
    # Its modules are found where ours are.
    ours.send(sys.path)
    deadline = time.monotonic() + _START_SECONDS
    while not ours.poll(1.0):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"the process of the fake device did not start: status {process.wait()}")
    with suppress(EOFError):
        ours.recv()
        return process, ours
    raise RuntimeError(f"the process of the fake device did not start: status {process.wait()}")
