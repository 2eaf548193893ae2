"""What a rank says when it ends because another is gone, and how it tells that from a failure of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from dsp_plugin.comm.agreement import hint
from dsp_plugin.comm.ledger import Ledger, Phase

STATUS = 75
"""Exit status of a rank that ends because another is gone: EX_TEMPFAIL of sysexits.h, for a restart may help."""

# By torch's and gloo's wording (unbound_buffer.cc, pair.cc) and NCCL's.
_CONNECTION_LOST = re.compile(
    "connection (was )?(likely )?(closed|reset|refused|lost|aborted)|broken pipe|socket closed|remote process exited|"
    "ncclRemoteError|ncclSystemError|unhandled system error|recvValue failed|sendBytes failed|failed to recv",
    re.IGNORECASE,
)
_WITHOUT_A_WORD = "its process ended without a word"
_ZOMBIE_SECONDS = 0.1
_REASONS: dict[int, str] = {
    signal.SIGKILL: ", by somebody's hand or because memory ran out",
    signal.SIGABRT: ", as gloo and NCCL do when ranks send each other what does not fit",
}
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
    if hint() and _of_a_collective(gone.how) and not any(hint() in line for line in lines):
        lines.append(f"  {hint()}")
    return "\n".join(lines) + "\n"


def _of_a_collective(how: str) -> bool:
    """Whether an end may have come of ranks that did not fit together."""
    unknown = _WITHOUT_A_WORD in how and not how.endswith(_REASONS[signal.SIGKILL])
    return unknown or bool(_CONNECTION_LOST.search(how) or _TIMED_OUT.search(how))


def without_a_word(pid: int, here: bool) -> str:
    """How a process ended whose connections were closed and that has not said why, as far as can be known.

    Args:
        pid: of the process.
        here: whether this machine's kernel is the one that knows.
    """
    status = _status(pid) if here else None
    if status is None:
        return f"{_WITHOUT_A_WORD}, killed (SIGKILL, out of memory), crashed or aborted: its own output may say more"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        names = {int(known): known.name for known in signal.Signals}
        return f"{_WITHOUT_A_WORD}: {names.get(number, f'signal {number}')}{_REASONS.get(number, '')}"
    return f"{_WITHOUT_A_WORD}, with exit status {os.WEXITSTATUS(status)}"


def _status(pid: int) -> int | None:
    """The status of a process that has ended and that its parent has not asked for yet, as `os.waitpid` gives it."""
    deadline = time.monotonic() + _ZOMBIE_SECONDS
    while time.monotonic() < deadline:
        try:
            # Its name, in parentheses, may hold anything.
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] == "Z":
                return int(fields[-1])
        except (OSError, IndexError, ValueError):
            return None
        # The kernel closes a process's connections shortly before that.
        time.sleep(0.005)
    return None


def _of_script(stack: list[traceback.FrameSummary]) -> list[str]:
    """A stack as text, from the script on: without what started it."""
    starts = [index for index, entry in enumerate(stack) if entry.filename == "<frozen runpy>"]
    return traceback.format_list(stack[starts[-1] + 1 :] if starts else stack)


def lost(error: BaseException) -> bool:
    """Whether an error is the mark of a connection that another rank has closed: word of that one may follow."""
    return _matches(_CONNECTION_LOST, error)


def timed_out(error: BaseException) -> bool:
    """Whether a collective gave up on other ranks, of which none need be dead."""
    return _matches(_TIMED_OUT, error)


def _matches(pattern: re.Pattern[str], error: BaseException) -> bool:
    """Whether it is in the words of an error or of its causes."""
    texts: list[str] = []
    link: BaseException | None = error
    while link is not None and len(texts) < 20:
        if isinstance(link, (RuntimeError, OSError)):
            texts.append(str(link))
        link = link.__cause__ or link.__context__
    return any(map(pattern.search, texts))


def one_line(error: BaseException) -> str:
    """An error's class and message, the latter up to 300 characters."""
    text = " ".join(str(error).split())
    return type(error).__name__ + (f": {text[:300]}" if text else "")


def say(text: str) -> None:
    """One write to stderr's descriptor: ranks do not mix their lines, and no lock of the main thread's is needed."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode(errors="replace"))
