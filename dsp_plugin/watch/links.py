"""Lines between ranks for words about the ranks themselves: JSON messages over TCP, a line each.

A killed process cannot say that it dies, but its kernel closes its connections at once, which a store that everybody
polls does not show. Nothing that trains goes this way.
"""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import fields
from typing import Any, TypeVar

Message = dict[str, Any]
Words = TypeVar("Words")

_LONGEST = 1 << 16
"""Bytes of the longest message; of a longer one nothing is kept."""
_LONGEST_WORD = 2000
_KINDS = {"int": int, "str": str}


class Link:
    """One end of a connection to a rank. No call blocks, and none raises because of what the other end does.

    Attributes:
        received: bytes that have arrived.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.received = 0
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
        """The messages that have arrived whole, and whether the other end has closed the connection.

        What is no message is left out: it is not for one line to end a run.
        """
        closed = False
        try:
            while not closed and len(self._unread) <= _LONGEST:
                arrived = self._connection.recv(_LONGEST)
                closed = not arrived
                self.received += len(arrived)
                self._unread += arrived
        except BlockingIOError:
            pass
        except OSError:
            closed = True
        *lines, self._unread = self._unread.split(b"\n")
        if len(self._unread) > _LONGEST:
            self._unread = b""
        messages = []
        for line in lines:
            # Nested too deeply it is a RecursionError.
            with contextlib.suppress(ValueError, RecursionError):
                messages.append(json.loads(line))
        return [message for message in messages if isinstance(message, dict)], closed

    def finish(self) -> None:
        """Says that nothing more will be sent. To close instead would discard what the other end has yet to read."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Frees the descriptor."""
        self._connection.close()


def words(kind: type[Words], message: object) -> Words | None:
    """A dataclass of numbers from 0 and texts, of a message that says just these; None of any other."""
    named = fields(kind)  # type: ignore[arg-type]
    if not isinstance(message, dict) or message.keys() != {field.name for field in named}:
        return None
    for field in named:
        value = message[field.name]
        if type(value) is not _KINDS[str(field.type)]:
            return None
        if not (0 <= value < 1 << 63 if isinstance(value, int) else len(str(value)) <= _LONGEST_WORD):
            return None
    return kind(**message)
