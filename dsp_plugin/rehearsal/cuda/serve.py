"""What the process of a `CudaProcess` does: run the functions that it is sent, until nobody is there to send one."""

from __future__ import annotations

import pickle
import sys
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dsp_plugin.rehearsal.cuda import device


def serve(connection: Connection) -> None:
    """Answer every call by ``(True, what was returned, "")`` or ``(False, what was raised, its traceback)``."""
    with suppress(EOFError, OSError):
        sys.path[:] = connection.recv()
        connection.send("ready")
        while True:
            connection.send_bytes(_answered(connection.recv_bytes()))


def _answered(call: bytes) -> bytes:
    try:
        function, arguments = pickle.loads(call)
        return pickle.dumps((True, function(*arguments), ""))
    except Exception as error:
        return _told(error)


def _told(error: Exception) -> bytes:
    trace = traceback.format_exc()
    answer: tuple[bool, Any, str] = (False, error, trace)
    try:
        told = pickle.dumps(answer)
        # Not all of torch's errors can be read.
        pickle.loads(told)
    except Exception:
        return pickle.dumps((False, RuntimeError(trace), ""))
    return told


if __name__ == "__main__":
    device.start(Path(sys.argv[1]))
    serve(Connection(int(sys.argv[2])))
