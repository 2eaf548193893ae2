"""Where rank 0 waits for the ranks that it watches: on the interface that they know it by, and on no other."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from dsp_plugin.watch import address


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)


def names(monkeypatch: pytest.MonkeyPatch, **known: str) -> None:
    """A resolver that knows these names."""

    def getaddrinfo(name: str, *args: object, **kwargs: object) -> list[tuple[object, ...]]:
        if name not in known:
            raise socket.gaierror("unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known[name], 0))]

    monkeypatch.setattr(address.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(address.socket, "gethostname", lambda: "node0")


@pytest.mark.parametrize(
    ("meeting", "local", "bound", "why"),
    [
        ("127.0.0.1", None, "127.0.0.1", None),
        ("127.0.0.2", None, "127.0.0.2", None),
        ("127.0.0.1", "4", "127.0.0.1", None),
        # As some job managers give rank 0 another address than the others.
        ("127.0.0.1", "2", None, "127.0.0.1 is 127.0.0.1 here, where no other machine gets through"),
        # As Debian has its own name.
        ("node0", "4", "127.0.1.1", None),
        ("node0", "2", None, "node0 is 127.0.1.1 here, where no other machine gets through"),
        ("node0", None, None, "node0 is 127.0.1.1 here, where no other machine gets through"),
        (None, "4", "127.0.1.1", None),
        (None, None, None, "node0 is 127.0.1.1 here, where no other machine gets through"),
        ("gateway", "2", None, "gateway is 192.0.2.7, which is no address of this machine"),
        ("nowhere", "2", None, "nowhere has no address"),
    ],
)
def test_rank_0_waits_where_the_others_find_it(
    meeting: str | None, local: str | None, bound: str | None, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    literal = {place: place for place in ("127.0.0.1", "127.0.0.2")}
    names(monkeypatch, node0="127.0.1.1", gateway="192.0.2.7", **literal)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    listener, said = address.listen(meeting, 4)
    with listener:
        assert said == why
        assert listener.getsockname()[0] == (bound or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0"))


def test_where_ranks_meet_is_the_environments_word_or_the_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    prefixed = dist.PrefixStore("a", dist.PrefixStore("b", store))
    assert address.meeting_point(prefixed) == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.9")
    assert address.meeting_point(prefixed) == "127.0.0.9"
    monkeypatch.delenv("MASTER_ADDR")
    assert address.meeting_point(dist.HashStore()) is None
