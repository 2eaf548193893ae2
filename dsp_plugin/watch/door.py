"""The two sides of rank 0's door: ranks show who they are before anything that they say counts.

Rank 0 greets each connection with a challenge. A rank answers with its name and the proof that it has the key which the
two share (`dsp_plugin.watch.secret`), and is let in with rank 0's proof in return. Whatever a stranger does instead, it
is one of a few, for a short time and a few bytes, and costs nobody else anything. The door is shut when all are in.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch.distributed import Store

from dsp_plugin.watch import secret
from dsp_plugin.watch.links import Link, Message, words

_STRANGERS = 64
"""Connections, beside one for each rank that is yet to come, of which nobody knows whose they are."""
_GREETING_BYTES = 4096
_GREETING_SECONDS = 10.0
_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_RETRY_SECONDS = 0.2
_RETRIES = 3
_RECONNECT_SECONDS = 2.0


def machine() -> str:
    """What two processes have in common that see each other's process numbers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@dataclass(frozen=True)
class Hub:
    """Where rank 0 waits for the other ranks, as it tells them through the store. Nothing of it is secret.

    Attributes:
        host: its name.
        pid: of its process.
        machine: see `machine`.
        address: the one that it waits at; empty where it does on all interfaces.
        port: TCP.
        public: its half of the keys.
    """

    host: str
    pid: int
    machine: str
    address: str
    port: int
    public: str

    def publish(self, store: Store, key: str) -> None:
        """Tells the other ranks."""
        store.set(key, json.dumps(asdict(self)))

    @staticmethod
    def find(store: Store, key: str) -> Hub:
        """What rank 0 has published, waited for if need be.

        Raises:
            ValueError: that is something else.
        """
        hub = words(Hub, json.loads(store.get(key)))
        if hub is None:
            raise ValueError("it is not where rank 0 waits")
        return hub


@dataclass(frozen=True)
class Greeting:
    """A rank's answer to a challenge.

    Attributes:
        rank: who it is.
        host: its name.
        pid: of its process.
        machine: see `machine`.
        challenge: what rank 0 is to answer in turn.
        proof: that it has the key.
    """

    rank: int
    host: str
    pid: int
    machine: str
    challenge: str
    proof: str

    def proven(self, key: bytes, challenge: str) -> str:
        """The proof that it takes."""
        return secret.proof(key, "a rank", self.rank, self.host, self.pid, self.machine, self.challenge, challenge)

    def proves(self, key: bytes, challenge: str) -> bool:
        """Whether it has it."""
        return hmac.compare_digest(self.proof.encode(errors="replace"), self.proven(key, challenge).encode())

    def answer(self, key: bytes, challenge: str) -> Message:
        """Rank 0's proof to the rank."""
        return {"welcome": secret.proof(key, "rank 0", self.challenge, challenge)}


@dataclass(eq=False)
class _Stranger:
    link: Link
    challenge: str
    since: float


class Door:
    """Rank 0's side.

    Args:
        listener: its socket.
        selector: of its thread; data are functions without arguments.
        ranks: how many are to come.
        key_of: the key shared with a rank that is yet to come; None for any other number.
        admit: is given the greeting and the link of a rank that has proven itself.
    """

    def __init__(
        self,
        listener: socket.socket,
        selector: selectors.BaseSelector,
        ranks: int,
        key_of: Callable[[int], bytes | None],
        admit: Callable[[Greeting, Link], None],
    ) -> None:
        self._listener, self._selector = listener, selector
        self._most = ranks + _STRANGERS
        self._key_of, self._admit = key_of, admit
        self._strangers: list[_Stranger] = []
        self._open_again: float | None = None
        selector.register(listener, selectors.EVENT_READ, self._accept)

    @property
    def busy(self) -> bool:
        """Whether somebody is at it, or cannot be let in yet."""
        return bool(self._strangers) or self._open_again is not None

    def tend(self, now: float) -> None:
        """Turns away who has taken too long; to be called every now and then."""
        while self._strangers and now - self._strangers[0].since > _GREETING_SECONDS:
            self._turn_away(self._strangers[0])
        if self._open_again is not None and now > self._open_again:
            self._open_again = None
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """Shuts it for good."""
        while self._strangers:
            self._turn_away(self._strangers[0])
        if self._listener.fileno() >= 0:
            if self._open_again is None:
                self._selector.unregister(self._listener)
            self._listener.close()
        self._open_again = None

    def free(self) -> None:
        """Frees its descriptors, of which a forked child has a copy; the selector is the parent's and left alone."""
        for stranger in self._strangers:
            stranger.link.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            link = Link(self._listener.accept()[0])
        except OSError as error:
            if error.errno in _FULL:
                # The connection still waits, and would wake this thread again and again.
                self._selector.unregister(self._listener)
                self._open_again = time.monotonic() + _RETRY_SECONDS
                if self._strangers:
                    self._turn_away(self._strangers[0])
            return
        if len(self._strangers) >= self._most:
            # A rank answers at once, so whoever has been here longest is none.
            self._turn_away(self._strangers[0])
        stranger = _Stranger(link, secret.challenge(), time.monotonic())
        self._strangers.append(stranger)
        self._selector.register(link, selectors.EVENT_READ, lambda: self._hear(stranger))
        link.send({"challenge": stranger.challenge})

    def _hear(self, stranger: _Stranger) -> None:
        messages, closed = stranger.link.receive()
        if messages and stranger.link.received <= _GREETING_BYTES:
            self._judge(stranger, words(Greeting, messages[0]))
        elif closed or stranger.link.received > _GREETING_BYTES:
            self._turn_away(stranger)

    def _judge(self, stranger: _Stranger, greeting: Greeting | None) -> None:
        key = None if greeting is None else self._key_of(greeting.rank)
        if greeting is not None and key is not None and greeting.proves(key, stranger.challenge):
            self._strangers.remove(stranger)
            self._selector.unregister(stranger.link)
            stranger.link.send(greeting.answer(key, stranger.challenge))
            self._admit(greeting, stranger.link)
        else:
            stranger.link.send({"refused": True})
            self._turn_away(stranger)

    def _turn_away(self, stranger: _Stranger) -> None:
        self._strangers.remove(stranger)
        self._selector.unregister(stranger.link)
        stranger.link.close()


class Visitor:
    """A rank's side.

    Args:
        places: addresses and ports where rank 0 may be, the likeliest first.
        key: shared with rank 0.
        greeting: who this rank is; the challenge and the proof are put in here.
        selector: of its thread; data are functions without arguments.
        admitted: is given the link once rank 0 has proven itself, too, and what rank 0 has said since.
        refused: is called when rank 0 does not take this rank for what it says, or is not rank 0.
        lost: is called when there is nobody at the door any more.
    """

    def __init__(
        self,
        places: Sequence[tuple[str, int]],
        key: bytes,
        greeting: Greeting,
        selector: selectors.BaseSelector,
        admitted: Callable[[Link, list[Message]], None],
        refused: Callable[[], None],
        lost: Callable[[], None],
    ) -> None:
        self._places, self._key, self._selector = places, key, selector
        self._greeting = replace(greeting, challenge=secret.challenge())
        self._admitted, self._refused, self._lost = admitted, refused, lost
        self._link: Link | None = None
        self._challenge = ""
        self._knock_again, self._failures = 0.0, 0

    def knock(self, seconds: float) -> None:
        """Connects to rank 0; its challenge is answered from the thread.

        Raises:
            OSError: nobody could be reached there within so many seconds.
        """
        deadline = time.monotonic() + seconds
        while self._link is None:
            try:
                self._connect(seconds)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_SECONDS)

    def _connect(self, seconds: float) -> None:
        *others, last = self._places
        connection = None
        for place in others:
            with contextlib.suppress(OSError):
                connection = socket.create_connection(place, timeout=seconds / len(self._places))
                break
        connection = connection or socket.create_connection(last, timeout=seconds)
        link = self._link = Link(connection)
        self._selector.register(link, selectors.EVENT_READ, lambda: self._hear(link))

    def tend(self, now: float) -> None:
        """Knocks again where rank 0 had no room; to be called every now and then."""
        if self._link is not None or now < self._knock_again:
            return
        self._knock_again = now + _RETRY_SECONDS
        try:
            self._connect(_RECONNECT_SECONDS)
            self._failures = 0
        except OSError:
            self._failures += 1
            if self._failures > _RETRIES:
                self._lost()

    def free(self) -> None:
        """Frees the descriptor."""
        if self._link is not None:
            self._link.close()

    def _hear(self, link: Link) -> None:
        messages, closed = link.receive()
        for index, message in enumerate(messages):
            if "challenge" in message and not self._challenge:
                self._challenge = str(message["challenge"])[:64]
                link.send(asdict(replace(self._greeting, proof=self._greeting.proven(self._key, self._challenge))))
            elif "welcome" in message or "refused" in message:
                self._selector.unregister(link)
                if message == self._greeting.answer(self._key, self._challenge):
                    self._admitted(link, messages[index + 1 :])
                else:
                    link.close()
                    self._refused()
                return
        if closed:
            self._selector.unregister(link)
            link.close()
            self._link, self._challenge = None, ""
