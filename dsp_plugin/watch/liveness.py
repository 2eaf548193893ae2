"""Watches the ranks of a run, and ends the others with a clear word when one dies.

A rank that dies in a collective leaves the others waiting in it: NCCL for its timeout, gloo sometimes for ever. Each
rank therefore keeps a thread with a line to rank 0 (`dsp_plugin.watch.links`). Rank 0 learns that a rank is gone when
its line closes without a farewell, when it says that its script failed, or when it is silent for the timeout; it tells
the others. They find out in the same way that rank 0 is gone. Every surviving rank then says who is gone and where
it itself was, and ends its process from the thread, for its main thread may never return.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import selectors
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict
from types import FrameType
from typing import cast

from torch import distributed as dist

from dsp_plugin.comm.agreement import LONGEST_TIMEOUT, hint
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.watch import last_words
from dsp_plugin.watch.address import meeting_point
from dsp_plugin.watch.company import Company, Peer
from dsp_plugin.watch.door import machine
from dsp_plugin.watch.last_words import STATUS, Gone, Latest, one_line, report, say
from dsp_plugin.watch.links import Message, words
from dsp_plugin.watch.secret import TOKEN

TIMEOUT = "DSP_PLUGIN_TIMEOUT"
"""Environment variable: seconds of silence after which a rank is taken for dead; 0 watches nobody."""

DEFAULT_TIMEOUT = 300.0
_FAREWELL_SECONDS = 2.0
_AGENT_SECONDS = 2.0
_CONNECT_SECONDS = 10.0
_TERMINATED_SECONDS = 1.0
_LOST_SECONDS = 10.0
_DOUBT_SECONDS = 10.0
"""How long a rank may be silent that is asked whether it is there, for a collective of another's has timed out."""
_UNSURE_SECONDS = 0.2
"""Between two looks at what is to be looked at soon."""

_ALIKE_SECONDS = 1.0
_SIGTERM = "it was terminated (SIGTERM)"
_SCRIPT_ENDED = "its script ended by "
_LONGEST_REASON = 1000


def seconds(flag: str | None) -> float:
    """What the user asked for, by ``--timeout`` or the environment; 0 is off.

    Raises:
        SequenceParallelConfigError: it is not a number of seconds.
    """
    text = os.environ.get(TIMEOUT) if flag is None else flag
    if flag is None and not text:
        return DEFAULT_TIMEOUT
    try:
        value = float(cast(str, text))
    except ValueError:
        value = math.nan
    if not 0 <= value <= LONGEST_TIMEOUT:
        raise SequenceParallelConfigError(
            setting=TIMEOUT if flag is None else "--timeout",
            value=text,
            why=f"it is not a number of seconds from 0 to {LONGEST_TIMEOUT:.0f} (30 days)",
            remedy=f"give the seconds of silence after which a rank is taken for dead, such as {DEFAULT_TIMEOUT:g}; "
            "0 watches nobody",
        )
    return value


class Watch:
    """One rank's part in the watch. Made by `join`; ends with `leave`, or ends the process.

    Attributes:
        timeout: seconds of silence after which a rank is taken for dead.
    """

    def __init__(self, rank: int, size: int, timeout: float, store: dist.Store, latest: Latest) -> None:
        self.timeout = timeout
        self._rank = rank
        self._latest = latest
        self._pid = os.getpid()
        self._beat = min(timeout / 5, 5.0)
        self._company = Company(rank, size, store, self._heed, self._unknown, self._lose)
        self._asked: float | None = None
        self._answered = False
        self._left = 0.0
        self._settled = threading.Event()
        self._farewell: Message | None = None
        self._error: BaseException | None = None
        self._terminated: float | None = None
        self._over = False
        self._inbox, self._outbox = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="dsp_plugin liveness", daemon=True)

    @classmethod
    def join(cls, store: dist.Store, rank: int, size: int, timeout: float, latest: Latest) -> Watch | None:
        """Begins to watch and be watched. Every rank calls it once; rank 0 first of all needs no other.

        Args:
            store: torch.distributed's, by which rank 0 tells where it is to be found. It is new after a restart.
            rank: this one.
            size: of the world.
            timeout: seconds; the same on every rank.
            latest: where this rank's last collective is kept.

        Returns:
            None where this rank cannot reach rank 0; it says so on stderr, and nobody watches it.
        """
        # A connection of its own: the main thread holds the script's for as long as it waits in it.
        own = store.clone() if hasattr(store, "clone") else store
        watch = cls(rank, size, timeout, own, latest)
        meeting = meeting_point(store)
        if rank == 0:
            if (why := watch._company.open(meeting)) is not None:
                say(
                    f"dsp_plugin: rank 0 waits for the ranks to be watched on all interfaces, for {why}. It hears none "
                    f"but ranks of this run. To have it on one, set MASTER_ADDR to an address of this machine by which "
                    f"the others reach it; {TIMEOUT}=0 watches nobody.\n"
                )
        elif (why := watch._company.knock(meeting, timeout, min(timeout, _CONNECT_SECONDS))) is not None:
            watch._give_up(why)
            return None
        watch._start()
        return watch

    def _give_up(self, why: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._company.give_up(why)
        say(f"dsp_plugin: rank {self._rank} is not watched: {why}. {TIMEOUT}=0 watches nobody.\n")
        self._over = True
        self._company.close()

    def _unknown(self) -> None:
        self._give_up(f"rank 0 and it have no secret in common. Set {TOKEN} to the same on every rank, or on none")

    def _lose(self, peer: Peer) -> None:
        self._end(peer.gone(self._without_a_word(peer)))

    def _start(self) -> None:
        self._inbox.setblocking(False)
        self._outbox.setblocking(False)
        self._company.selector.register(self._inbox, selectors.EVENT_READ, self._woken)
        os.register_at_fork(after_in_child=self._forked)
        self._handles_sigterm = False
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _terminated)
            signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
            self._handles_sigterm = True
        self._thread.start()

    def leave(self, error: BaseException | None = None) -> None:
        """Stops watching and being watched: the script is over.

        Args:
            error: what left the script. Where it is the mark of a lost connection, the rank that is gone is waited for
                first, and named in place of this one: then this call does not return.
        """
        if os.getpid() != self._pid:
            return
        if error is not None:
            self._error = error
            self._await_word(error)
        ended = None if error is None else f"{_SCRIPT_ENDED}{one_line(error)}"
        self._left = time.monotonic()
        self._farewell = {"left": True} if ended is None else {"ended": ended}
        self._wake()
        self._thread.join()
        if self._handles_sigterm and signal.getsignal(signal.SIGTERM) is _terminated:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _await_word(self, error: BaseException) -> None:
        """Lets the watch name a rank that may be behind an error of this one, and end this one; returns if none is."""
        known = "No rank is known to have died."
        if last_words.lost(error):
            deadline = time.monotonic() + min(self.timeout, _LOST_SECONDS)
            # Of those who have said farewell nothing more is to be heard.
            while self._thread.is_alive() and self._company.peers and time.monotonic() < deadline:
                self._thread.join(_UNSURE_SECONDS)
            known += " A rank that had finished has closed the connection, or the network has."
        elif last_words.timed_out(error):
            self._settled.clear()
            self._asked = -1.0
            self._wake()
            # Rank 0 takes one such time to find who does not answer, and this rank to find that it is rank 0.
            self._settled.wait(min(self.timeout, 2.5 * _DOUBT_SECONDS))
            if self._settled.is_set():
                known += " All that were asked have answered."
        else:
            return
        if hint() and not any(hint() in note for note in getattr(error, "__notes__", ())):
            known += f" {hint()}"
        error.add_note(f"dsp_plugin: {known}")

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._outbox.send(b"\0")

    def _run(self) -> None:
        awake = time.monotonic()
        beaten = 0.0
        while not self._finished():
            unsure = self._asked is not None or self._company.unsettled
            ready = self._company.selector.select(min(self._beat, _UNSURE_SECONDS) if unsure else self._beat)
            now = time.monotonic()
            # What this process slept (stopped, or a compiler that kept the interpreter) counts for nobody.
            overslept = now - awake - 2 * self._beat
            if overslept > 0:
                for peer in self._company.peers.values():
                    peer.heard += overslept
            awake = now
            for key, _ in ready:
                if key.fileobj.fileno() >= 0:  # type: ignore[union-attr]
                    key.data()
            self._company.tend(now)
            if self._asked is not None:
                self._doubt(now)
            if now - beaten >= self._beat:
                beaten = now
                self._company.tell({"alive": True})
            self._judge(now)
            if self._terminated is not None and now > self._terminated:
                self._company.tell({"ended": _SIGTERM})
                self._company.drain(_FAREWELL_SECONDS)
                os._exit(128 + signal.SIGTERM)
        if self._farewell is not None:
            self._company.tell(self._farewell)
        self._company.drain(_FAREWELL_SECONDS)
        self._company.close()
        self._settled.set()

    def _finished(self) -> bool:
        """Whether this rank's part is over: it has said so to all, or nobody hears it."""
        if self._farewell is None:
            return self._over and not self._company.peers
        # An error is not kept from those who are here for the sake of one who may never come.
        late = "ended" in self._farewell and time.monotonic() > self._left + _FAREWELL_SECONDS
        return late or self._over or self._company.complete

    def _doubt(self, now: float) -> None:
        """Asks all ranks whether they are there; once they have answered, none is behind what has timed out."""
        assert self._asked is not None
        here = [peer for peer in self._company.peers.values() if peer.link is not None]
        if self._asked < 0:
            self._asked, self._answered = now, False
            self._company.tell({"asked": True})
        elif all(peer.heard > self._asked for peer in here) and (self._rank == 0 or self._answered):
            self._company.tell({"nobody": True})
            self._asked = None
            self._settled.set()

    def _heed(self, peer: Peer, messages: list[Message], closed: bool) -> None:
        for message in messages:
            if "left" in message:
                self._company.forget(peer)
                return
            if "ended" in message:
                self._end(peer.gone(str(message["ended"])[:_LONGEST_REASON]))
            if (gone := words(Gone, message.get("gone"))) is not None:
                self._end(gone)
            if "nobody" in message:
                self._answered = True
            if "asked" in message and peer.link is not None:
                peer.link.send({"alive": True})
                if self._rank == 0 and self._asked is None:
                    self._asked = -1.0
        if closed:
            self._end(peer.gone(self._without_a_word(peer)))

    def _without_a_word(self, peer: Peer) -> str:
        return last_words.without_a_word(peer.pid, here=bool(peer.machine) and peer.machine == machine())

    def _judge(self, now: float) -> None:
        """Accuses the rank that has been silent for too long."""
        for peer in list(self._company.peers.values()):
            silent = now - peer.heard
            doubted = self._asked is not None and peer.heard < self._asked < now - _DOUBT_SECONDS
            if silent <= self.timeout and not (doubted and peer.link is not None):
                continue
            if peer.link is None and self._company.excused(peer):
                self._company.forget(peer)
                continue
            how = "it never reported" if peer.link is None else f"it has been silent for {silent:.1f} s"
            self._end(peer.gone(f"{how}: its process is stopped or stuck, or its host or network is down"))

    def _woken(self) -> None:
        """Wakes up for a farewell, or for the signals that Python's handler has no turn to see in a collective."""
        signals = self._inbox.recv(64)
        if signal.SIGTERM in signals and signal.getsignal(signal.SIGTERM) is _terminated and not self._terminated:
            # An agent that ends the others for the sake of a dead rank may be quicker than the word of its death.
            self._terminated = time.monotonic() + _TERMINATED_SECONDS
            self._beat = min(self._beat, _TERMINATED_SECONDS / 5)

    def _end(self, gone: Gone) -> None:
        """Tells the others, says who is gone, and ends the process; returns if this rank is about to fail alike."""
        if self._over:
            return
        self._over = True
        self._company.tell({"gone": asdict(gone)})
        self._company.finish()
        if self._terminated is not None and gone.how == _SIGTERM:
            os._exit(128 + signal.SIGTERM)
        # A rank that fails as it starts may be gone before it has heard of this one.
        early = self._company.meeting
        if (early or gone.how.startswith(_SCRIPT_ENDED)) and self._fails_alike():
            return
        say(report(self._rank, gone, self._latest, self._error))
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1.0)
        self._company.drain(_FAREWELL_SECONDS)
        if "TORCHELASTIC_RUN_ID" in os.environ:
            self._await_agent()
        os._exit(STATUS)

    def _fails_alike(self) -> bool:
        """Whether this rank's script ends by an error of its own too: what is refused is refused on every rank."""
        deadline = time.monotonic() + _ALIKE_SECONDS
        while self._farewell is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._farewell is not None and "ended" in self._farewell

    def _await_agent(self) -> None:
        """Lets torchrun's agent find the dead rank and end this one: it blames the rank that it finds first."""
        deadline = time.monotonic() + _AGENT_SECONDS
        while (left := deadline - time.monotonic()) > 0 and select.select([self._inbox], [], [], left)[0]:
            if signal.SIGTERM in self._inbox.recv(64):
                return

    def _forked(self) -> None:
        """A forked child that kept the connections would keep a dead rank alive in the eyes of the others."""
        self._company.close()
        if signal.getsignal(signal.SIGTERM) is _terminated:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM's handler while a watch is on, which leaves it to the watch's thread to end the process."""
