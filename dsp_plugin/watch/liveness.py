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
from dataclasses import asdict, dataclass
from datetime import timedelta
from types import FrameType
from typing import cast

from torch import distributed as dist

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.watch.last_words import STATUS, Gone, Latest, one_line, patience, report, say
from dsp_plugin.watch.links import Hub, Link, Message

TIMEOUT = "DSP_PLUGIN_TIMEOUT"
"""Environment variable: seconds of silence after which a rank is taken for dead; 0 watches nobody."""

DEFAULT_TIMEOUT = 300.0
LONGEST_TIMEOUT = 30 * 86400.0
_KEY = "dsp_plugin/liveness"
_FAREWELL_SECONDS = 2.0
_AGENT_SECONDS = 2.0
_CONNECT_SECONDS = 10.0
_TERMINATED_SECONDS = 1.0

_ALIKE_SECONDS = 1.0
_SIGTERM = "it was terminated (SIGTERM)"
_SCRIPT_ENDED = "its script ended by "


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


@dataclass
class _Peer:
    """A rank that is watched. Its name is rank 0's guess until it has introduced itself."""

    rank: int
    heard: float
    host: str = "unknown"
    pid: int = 0
    link: Link | None = None

    def gone(self, how: str) -> Gone:
        return Gone(self.rank, self.host, self.pid, how)


class Watch:
    """One rank's part in the watch. Made by `join`; ends with `leave`, or ends the process.

    Attributes:
        timeout: seconds of silence after which a rank is taken for dead.
    """

    def __init__(self, rank: int, timeout: float, peers: dict[int, _Peer], store: dist.Store, latest: Latest) -> None:
        self.timeout = timeout
        self._rank = rank
        self._peers = peers
        self._store = store
        self._latest = latest
        self._pid = os.getpid()
        self._beat = min(timeout / 5, 5.0)
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._token = ""
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
        if rank == 0:
            hub, listener = Hub.listen()
            watch = cls(rank, timeout, {peer: _Peer(peer, time.monotonic()) for peer in range(1, size)}, own, latest)
            watch._listener, watch._token = listener, hub.token
            watch._selector.register(listener, selectors.EVENT_READ, watch._accept)
            hub.publish(own, _KEY)
        else:
            own.wait([_KEY], timedelta(seconds=timeout))
            hub = Hub.find(own, _KEY)
            try:
                link = hub.connect(rank, min(timeout, _CONNECT_SECONDS))
            except OSError as error:
                own.set(_unreachable(rank), str(error))
                say(
                    f"dsp_plugin: rank {rank} is not watched: it cannot reach rank 0 at port {hub.port} of "
                    f"{os.environ.get('MASTER_ADDR') or hub.host} ({error}). {TIMEOUT}=0 watches nobody.\n"
                )
                return None
            peer = _Peer(0, time.monotonic(), hub.host, hub.pid, link)
            watch = cls(rank, timeout, {0: peer}, own, latest)
            watch._selector.register(link, selectors.EVENT_READ, lambda: watch._read(peer))
        watch._start()
        return watch

    def _start(self) -> None:
        self._inbox.setblocking(False)
        self._outbox.setblocking(False)
        self._selector.register(self._inbox, selectors.EVENT_READ, self._woken)
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
            self._thread.join(patience(error, self.timeout))
            if self._thread.is_alive() and patience(error, self.timeout):
                error.add_note(
                    "dsp_plugin: no rank is known to have died. The connection was closed by a rank that had finished, "
                    "or by the network."
                )
        ended = None if error is None else f"{_SCRIPT_ENDED}{one_line(error)}"
        self._farewell = {"left": True} if ended is None else {"ended": ended}
        self._wake()
        self._thread.join()
        if self._handles_sigterm and signal.getsignal(signal.SIGTERM) is _terminated:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._outbox.send(b"\0")

    def _run(self) -> None:
        awake = time.monotonic()
        beaten = 0.0
        while not (self._farewell and (self._all_here() or "ended" in self._farewell)):
            ready = self._selector.select(self._beat)
            now = time.monotonic()
            # What this process slept (stopped, or a compiler that kept the interpreter) counts for nobody.
            overslept = now - awake - 2 * self._beat
            if overslept > 0:
                for peer in self._peers.values():
                    peer.heard += overslept
            awake = now
            for key, _ in ready:
                key.data()
            if now - beaten >= self._beat:
                beaten = now
                self._tell({"alive": True})
            self._judge(now)
            if self._terminated is not None and now > self._terminated:
                self._tell({"ended": _SIGTERM})
                self._drain(_FAREWELL_SECONDS)
                os._exit(128 + signal.SIGTERM)
        self._tell(self._farewell)
        self._drain(_FAREWELL_SECONDS)
        self._close()

    def _all_here(self) -> bool:
        return all(peer.link is not None for peer in self._peers.values())

    def _tell(self, message: Message) -> None:
        for peer in self._peers.values():
            if peer.link is not None:
                peer.link.send(message)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):
            link = Link(self._listener.accept()[0])
            self._selector.register(link, selectors.EVENT_READ, lambda: self._greet(link))

    def _greet(self, link: Link) -> None:
        """Reads who a new connection is."""
        messages, closed = link.receive()
        if not messages and not closed:
            return
        self._selector.unregister(link)
        peer = self._peers.get(messages[0].get("rank", 0)) if messages else None
        if peer is None or peer.link is not None or messages[0].get("token") != self._token:
            link.close()
            return
        peer.link, peer.heard = link, time.monotonic()
        peer.host, peer.pid = str(messages[0]["host"]), int(messages[0]["pid"])
        self._selector.register(link, selectors.EVENT_READ, lambda: self._read(peer))
        self._heed(peer, messages[1:], closed)

    def _read(self, peer: _Peer) -> None:
        assert peer.link is not None
        messages, closed = peer.link.receive()
        peer.heard = time.monotonic()
        self._heed(peer, messages, closed)

    def _heed(self, peer: _Peer, messages: list[Message], closed: bool) -> None:
        for message in messages:
            if "left" in message:
                self._forget(peer)
                return
            if "ended" in message:
                self._end(peer.gone(message["ended"]))
            if "gone" in message:
                self._end(Gone(**message["gone"]))
        if closed:
            self._end(peer.gone("its process ended without a word: it was killed (SIGKILL, out of memory) or crashed"))

    def _forget(self, peer: _Peer) -> None:
        del self._peers[peer.rank]
        if peer.link is not None:
            self._selector.unregister(peer.link)
            peer.link.close()

    def _judge(self, now: float) -> None:
        """Accuses the rank that has been silent for too long."""
        for peer in list(self._peers.values()):
            silent = now - peer.heard
            if silent <= self.timeout:
                continue
            if peer.link is None and self._excused(peer):
                self._forget(peer)
                continue
            how = "it never reported" if peer.link is None else f"it has been silent for {silent:.1f} s"
            self._end(peer.gone(f"{how}: its process is stopped or stuck, or its host or network is down"))

    def _excused(self, peer: _Peer) -> bool:
        """Whether a rank that never reported could not, and has said so."""
        try:
            return self._store.check([_unreachable(peer.rank)])
        except RuntimeError:
            return False

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
        self._tell({"gone": asdict(gone)})
        for peer in self._peers.values():
            if peer.link is not None:
                peer.link.finish()
        if self._terminated is not None and gone.how == _SIGTERM:
            os._exit(128 + signal.SIGTERM)
        if gone.how.startswith(_SCRIPT_ENDED) and self._fails_alike():
            return
        say(report(self._rank, gone, self._latest, self._error))
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(1.0)
        self._drain(_FAREWELL_SECONDS)
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

    def _drain(self, limit: float) -> None:
        """Lets the others read what was sent to them: a connection closed on unread messages takes that along."""
        links = [peer.link for peer in self._peers.values() if peer.link is not None]
        for link in links:
            link.finish()
        deadline = time.monotonic() + limit
        while links and time.monotonic() < deadline:
            links = [link for link in links if not link.receive()[1]]
            time.sleep(0.01)

    def _close(self) -> None:
        for peer in self._peers.values():
            if peer.link is not None:
                peer.link.close()
        self._peers.clear()
        if self._listener is not None:
            self._listener.close()

    def _forked(self) -> None:
        """A forked child that kept the connections would keep a dead rank alive in the eyes of the others."""
        self._close()
        if signal.getsignal(signal.SIGTERM) is _terminated:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unreachable(rank: int) -> str:
    return f"{_KEY}/unreachable/{rank}"


def _terminated(number: int, frame: FrameType | None) -> None:
    """SIGTERM's handler while a watch is on, which leaves it to the watch's thread to end the process."""
