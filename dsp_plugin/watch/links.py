"""Lines between ranks for words about the ranks themselves: JSON messages over TCP, a line each.

A killed process cannot say that it dies, but its kernel closes its connections at once, which a store that everybody
polls does not show. Nothing that trains goes this way.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from typing import Any

from torch.distributed import Store

Message = dict[str, Any]

_LONGEST = 1 << 16
"""Bytes of the longest message; who sends more is not one of us."""


class Link:
    """One end of a connection to a rank. No call blocks, and none raises because the other end is gone."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._unread = b""

    def fileno(self) -> int:
        """The descriptor, for a selector; -1 once closed."""
        return self._connection.fileno()

    def send(self, message: Message) -> None:
        """Sends a message; it is lost if the other end is gone or has not read for a long time."""
        with contextlib.suppress(OSError):
            self._connection.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[list[Message], bool]:
        """The messages that have arrived whole, and whether the other end has closed the connection."""
        closed = False
        try:
            while not closed and len(self._unread) <= _LONGEST:
                arrived = self._connection.recv(_LONGEST)
                closed = not arrived
                self._unread += arrived
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        *lines, self._unread = self._unread.split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return [], True
        strange = len(self._unread) > _LONGEST or not all(isinstance(message, dict) for message in messages)
        return ([], True) if strange else (messages, closed)

    def finish(self) -> None:
        """Says that nothing more will be sent. To close instead would discard what the other end has yet to read."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Frees the descriptor."""
        self._connection.close()


@dataclass(frozen=True)
class Hub:
    """Where rank 0 waits for the other ranks, as it tells them through the store.

    Attributes:
        host: its name.
        pid: of its process.
        port: TCP.
        token: what shows that a connection comes from a rank of the same run.
    """

    host: str
    pid: int
    port: int
    token: str

    @staticmethod
    def listen() -> tuple[Hub, socket.socket]:
        """A socket on a free port of all interfaces, and how to find it."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=both)
        listener.setblocking(False)
        return Hub(socket.gethostname(), os.getpid(), listener.getsockname()[1], secrets.token_hex(16)), listener

    def publish(self, store: Store, key: str) -> None:
        """Tells the other ranks."""
        store.set(key, json.dumps(asdict(self)))

    @staticmethod
    def find(store: Store, key: str) -> Hub:
        """What rank 0 has published, waited for if need be."""
        return Hub(**json.loads(store.get(key)))

    def connect(self, rank: int, seconds: float) -> Link:
        """A line to rank 0, on which this rank has introduced itself.

        The address is MASTER_ADDR where the environment has it: every rank is known to reach rank 0 there.

        Raises:
            OSError: nobody could be reached there within so many seconds.
        """
        address = os.environ.get("MASTER_ADDR") or self.host
        deadline = time.monotonic() + seconds
        while True:
            try:
                connection = socket.create_connection((address, self.port), timeout=seconds)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        link = Link(connection)
        link.send({"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "token": self.token})
        return link
