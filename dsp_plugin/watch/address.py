"""Where rank 0 waits for the others: at the address by which they find it, on no other interface than that one."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import Any

from torch.distributed import PrefixStore, Store

_BACKLOG = 1024


def meeting_point(store: Store) -> str | None:
    """Name or address by which every rank is known to reach rank 0: the environment's, or the store's, if any."""
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return os.environ.get("MASTER_ADDR") or getattr(store, "host", None)


def listen(meeting: str | None, size: int) -> tuple[socket.socket, str | None]:
    """A socket on a free port of the interface that ranks know rank 0 by.

    A host's own name can stand for a loopback address on it (Debian's /etc/hosts), or for one that only a gateway has.
    Then nothing but all interfaces is known to be where the others get through.

    Args:
        meeting: `meeting_point` of the store.
        size: of the world.

    Returns:
        The socket, and why it is on all interfaces; None where it is not.
    """
    name = meeting or socket.gethostname()
    why = f"{name} has no address"
    for family, place in _addresses(name):
        try:
            listener = socket.create_server((place[0], 0, *place[2:]), family=family, backlog=_BACKLOG)
        except OSError:
            why = f"{name} is {place[0]}, which is no address of this machine"
            continue
        if not ipaddress.ip_address(place[0].partition("%")[0]).is_loopback or _all_here(name, size):
            listener.setblocking(False)
            return listener, None
        listener.close()
        why = f"{name} is {place[0]} here, where no other machine gets through"
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    listener = socket.create_server(("", 0), family=family, backlog=_BACKLOG, dualstack_ipv6=both)
    listener.setblocking(False)
    return listener, why


def _addresses(name: str) -> Iterator[tuple[socket.AddressFamily, Any]]:
    with contextlib.suppress(OSError, UnicodeError):
        for family, _, _, _, place in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
            if family in (socket.AF_INET, socket.AF_INET6):
                yield family, place


def _all_here(name: str, size: int) -> bool:
    """Whether all ranks are on this machine: the launcher says so, or they are to meet at a loopback address."""
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local is not None:
        return local == str(size)
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"
