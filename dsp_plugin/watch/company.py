"""The ranks that a rank has a line to: all others on rank 0, rank 0 on the others. How they meet, and how they part."""

from __future__ import annotations

import os
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import Store

from dsp_plugin.watch.address import listen
from dsp_plugin.watch.door import Door, Greeting, Hub, Visitor, machine
from dsp_plugin.watch.last_words import Gone
from dsp_plugin.watch.links import Link, Message
from dsp_plugin.watch.secret import Half

_KEY = "dsp_plugin/liveness"


@dataclass
class Peer:
    """A rank that is watched. Its name is a guess, and there is no link to it, until it has introduced itself.

    Attributes:
        heard: when it gave the last sign of life.
        machine: see `dsp_plugin.watch.door.machine`.
    """

    rank: int
    heard: float
    host: str = "unknown"
    pid: int = 0
    machine: str = ""
    link: Link | None = None

    def gone(self, how: str) -> Gone:
        """This rank as one that is no more."""
        return Gone(self.rank, self.host, self.pid, how)


class Company:
    """Whom a rank is in touch with.

    Args:
        rank: this one.
        size: of the world.
        store: torch.distributed's, which is open to strangers: nothing that is put there is secret.
        heed: is given what a peer has said, and whether it has closed its line.
        unknown: is called where rank 0 and this rank have no secret in common.
        lost: is called where rank 0 is no longer to be found, before it has let this rank in.

    Attributes:
        peers: by rank.
        selector: of the thread that calls `tend`; data are functions without arguments.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store,
        heed: Callable[[Peer, list[Message], bool], None],
        unknown: Callable[[], None],
        lost: Callable[[Peer], None],
    ) -> None:
        now = time.monotonic()
        self.peers = {peer: Peer(peer, now) for peer in (range(1, size) if rank == 0 else range(1))}
        self.selector = selectors.DefaultSelector()
        self._rank, self._store, self._half = rank, store, Half()
        self._heed, self._unknown, self._lost = heed, unknown, lost
        self._door: Door | None = None
        self._visitor: Visitor | None = None

    def open(self, meeting: str | None) -> str | None:
        """Rank 0: waits for the others, from now on.

        Args:
            meeting: where they are known to find it.

        Returns:
            Why it waits on all interfaces; None where it does not.
        """
        listener, why = listen(meeting, len(self.peers) + 1)
        self._door = Door(listener, self.selector, len(self.peers), self._key, self._admit)
        address, port, *_ = listener.getsockname()
        at = address if why is None else ""
        Hub(socket.gethostname(), os.getpid(), machine(), at, port, self._half.public).publish(self._store, _KEY)
        return why

    def knock(self, meeting: str | None, patience: float, seconds: float) -> str | None:
        """Another rank: goes to rank 0.

        Args:
            meeting: where it is known to be found.
            patience: seconds for rank 0 to say that it waits.
            seconds: for it to be reached then.

        Returns:
            Why it cannot be reached; None where it can.
        """
        try:
            self._store.wait([_KEY], timedelta(seconds=patience))
            hub = Hub.find(self._store, _KEY)
        except (RuntimeError, ValueError) as error:
            return f"rank 0 has not said where it is ({error})"
        peer = self.peers[0]
        peer.host, peer.pid, peer.machine = hub.host, hub.pid, hub.machine
        self._store.set(_public(self._rank), self._half.public)
        address = meeting or hub.host
        # A host with several names for several networks may be known here by another one than rank 0's own.
        addresses = [address, *([hub.address] if hub.address else [])]
        self._visitor = Visitor(
            [(each, hub.port) for each in dict.fromkeys(addresses)],
            self._half.key_with(hub.public) or b"",
            Greeting(self._rank, socket.gethostname(), os.getpid(), machine(), "", ""),
            self.selector,
            lambda link, messages: self._hear(peer, link, messages),
            self._unknown,
            lambda: self._lost(peer),
        )
        try:
            self._visitor.knock(seconds)
        except OSError as error:
            place = hub.address or "all interfaces"
            return f"it cannot reach rank 0 at port {hub.port} of {address} ({error}); rank 0 waits at {place}"
        return None

    @property
    def complete(self) -> bool:
        """Whether there is a line to every peer."""
        return all(peer.link is not None for peer in self.peers.values())

    @property
    def meeting(self) -> bool:
        """Whether this rank is still to be let in."""
        return self._visitor is not None and not self.complete

    @property
    def unsettled(self) -> bool:
        """Whether `tend` should be called soon."""
        return self.meeting or (self._door is not None and self._door.busy)

    def tend(self, now: float) -> None:
        """What is not a matter of one line; to be called every now and then."""
        if self._door is not None:
            self._door.tend(now)
            if self.complete:
                self._door.close()
                self._door = None
        if self._visitor is not None and self.meeting:
            self._visitor.tend(now)

    def tell(self, message: Message) -> None:
        """To all peers."""
        for link in self._links():
            link.send(message)

    def forget(self, peer: Peer) -> None:
        """A peer that is no longer watched."""
        del self.peers[peer.rank]
        if peer.link is not None:
            self.selector.unregister(peer.link)
            peer.link.close()

    def finish(self) -> None:
        """Says that nothing more will be said."""
        for link in self._links():
            link.finish()

    def drain(self, limit: float) -> None:
        """Lets the others read what was sent to them: a connection closed on unread messages takes that along."""
        self.finish()
        links = self._links()
        deadline = time.monotonic() + limit
        while links and time.monotonic() < deadline:
            links = [link for link in links if not link.receive()[1]]
            time.sleep(0.01)

    def close(self) -> None:
        """Frees all descriptors, in a forked child too, whose selector is its parent's."""
        for link in self._links():
            link.close()
        self.peers.clear()
        for place in (self._door, self._visitor):
            if place is not None:
                place.free()

    def give_up(self, why: str) -> None:
        """Leaves word for rank 0, which looks for it before it accuses a rank that never came."""
        self._store.set(_unreachable(self._rank), why)

    def excused(self, peer: Peer) -> bool:
        """Whether a rank that never came could not, and has said so."""
        try:
            return self._store.check([_unreachable(peer.rank)])
        except RuntimeError:
            return False

    def _links(self) -> list[Link]:
        return [peer.link for peer in self.peers.values() if peer.link is not None]

    def _key(self, rank: int) -> bytes | None:
        """What rank 0 shares with a rank that is yet to come."""
        peer, name = self.peers.get(rank), _public(rank)
        if peer is None or peer.link is not None:
            return None
        try:
            public = self._store.get(name) if self._store.check([name]) else b""
        except RuntimeError:
            return None
        return self._half.key_with(public.decode(errors="replace"))

    def _admit(self, greeting: Greeting, link: Link) -> None:
        peer = self.peers[greeting.rank]
        peer.host, peer.pid, peer.machine = greeting.host, greeting.pid, greeting.machine
        self._hear(peer, link, [])

    def _hear(self, peer: Peer, link: Link, messages: list[Message]) -> None:
        """Listens to a peer that has shown that it is the one."""
        peer.link, peer.heard = link, time.monotonic()
        self.selector.register(link, selectors.EVENT_READ, lambda: self._read(peer, link))
        self._heed(peer, messages, False)

    def _read(self, peer: Peer, link: Link) -> None:
        messages, closed = link.receive()
        peer.heard = time.monotonic()
        self._heed(peer, messages, closed)


def _public(rank: int) -> str:
    return f"{_KEY}/public/{rank}"


def _unreachable(rank: int) -> str:
    return f"{_KEY}/unreachable/{rank}"
