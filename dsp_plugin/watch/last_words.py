"""What a rank says when it ends because another is gone, and how it tells that from a failure of its own."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import cast

from dsp_plugin.comm.ledger import Ledger, Phase

STATUS = 75
"""Exit status of a rank that ends because another is gone: EX_TEMPFAIL of sysexits.h, for a restart may help."""

# By torch's and gloo's wording (unbound_buffer.cc, pair.cc) and NCCL's.
_CONNECTION_LOST = re.compile(
    "connection (was )?(likely )?(closed|reset|refused|lost|aborted)|broken pipe|socket closed|remote process exited|"
    "ncclRemoteError|ncclSystemError|unhandled system error|recvValue failed|sendBytes failed|failed to recv",
    re.IGNORECASE,
)
_LOST_SECONDS = 10.0
_TIMED_OUT = re.compile("timed out waiting|application timeout|collective operation timeout", re.IGNORECASE)


@dataclass(frozen=True)
class Gone:
    """A rank that is no more, and how that is known."""

    rank: int
    host: str
    pid: int
    how: str


class Latest(Ledger):
    """A ledger that keeps its last entry only: the collective a rank is in, or was in last."""

    def __init__(self) -> None:
        super().__init__()
        self._entry: tuple[float, str] | None = None

    def add(self, method: str, collective: str, group: str, phase: Phase, nbytes: int) -> None:
        """Remember this one."""
        self._entry = time.monotonic(), f"{collective} of {method} ({phase}, group {group}, {nbytes:,} bytes)"

    def __str__(self) -> str:
        if self._entry is None:
            return "It has entered no sequence-parallel collective."
        entered, what = self._entry
        return f"Its last sequence-parallel collective: {what}, entered {time.monotonic() - entered:.1f} s ago."


def report(rank: int, gone: Gone, latest: Latest, error: BaseException | None) -> str:
    """Who is gone, and what this rank was doing: its error, or its main thread's stack, from the script on.

    Args:
        rank: this one.
        gone: the one that is no more.
        latest: this rank's last collective.
        error: what has left this rank's script since.
    """
    lines = [
        f"dsp_plugin: rank {gone.rank} (host {gone.host}, pid {gone.pid}) is gone: {gone.how}.",
        f"  Rank {rank} (host {socket.gethostname()}, pid {os.getpid()}) ends with status {STATUS}. {latest}",
    ]
    if error is not None:
        lines.append("  What it met itself:")
        trace = _of_script(traceback.extract_tb(error.__traceback__)) + traceback.format_exception_only(error)
    else:
        lines.append("  What it was doing:")
        frame = sys._current_frames().get(cast(int, threading.main_thread().ident))
        trace = [] if frame is None else _of_script(traceback.extract_stack(frame))
    lines += [f"    {line}" for block in trace for line in block.rstrip().splitlines()]
    return "\n".join(lines) + "\n"


def _of_script(stack: list[traceback.FrameSummary]) -> list[str]:
    """A stack as text, from the script on: without what started it."""
    starts = [index for index, entry in enumerate(stack) if entry.filename == "<frozen runpy>"]
    return traceback.format_list(stack[starts[-1] + 1 :] if starts else stack)


def patience(error: BaseException, timeout: float) -> float:
    """Seconds to wait for word of a dead rank before an error is taken for this rank's own; 0 for most errors.

    Args:
        error: what has left the script; its causes count as well.
        timeout: seconds of silence after which a rank is taken for dead.
    """
    texts: list[str] = []
    link: BaseException | None = error
    while link is not None and len(texts) < 20:
        if isinstance(link, (RuntimeError, OSError)):
            texts.append(str(link))
        link = link.__cause__ or link.__context__
    if any(map(_CONNECTION_LOST.search, texts)):
        return min(timeout, _LOST_SECONDS)
    # A collective gave up on a rank whose silence is not yet as long as the watch allows.
    return timeout if any(map(_TIMED_OUT.search, texts)) else 0.0


def one_line(error: BaseException) -> str:
    """An error's class and message, the latter up to 300 characters."""
    text = " ".join(str(error).split())
    return type(error).__name__ + (f": {text[:300]}" if text else "")


def say(text: str) -> None:
    """One write to stderr's descriptor: ranks do not mix their lines, and no lock of the main thread's is needed."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="replace"))
