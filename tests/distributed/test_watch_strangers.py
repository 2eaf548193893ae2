"""Strangers who reach the watch's port, or read torch's store: they harm nobody but themselves, and learn nothing."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from dsp_plugin.spawn import spawn
from dsp_plugin.watch import door, secret
from dsp_plugin.watch.door import Greeting, Hub
from dsp_plugin.watch.last_words import Gone, Latest
from dsp_plugin.watch.links import words
from dsp_plugin.watch.liveness import Watch

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(60)]

KEY = "dsp_plugin/liveness"


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv(secret.TOKEN, raising=False)


class World:
    """Rank 0 of three, and ranks that come when they are told to, all in this process."""

    def __init__(self, size: int = 3, timeout: float = 30.0) -> None:
        self.store = dist.HashStore()
        self.size, self.timeout = size, timeout
        self.watches = [self.join(0)]
        self.hub = Hub.find(self.store, KEY)

    def join(self, rank: int) -> Watch:
        watch = Watch.join(self.store, rank, self.size, self.timeout, Latest())
        assert watch is not None
        return watch

    def come(self, *ranks: int) -> None:
        self.watches += [self.join(rank) for rank in ranks]

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.hub.port), timeout=10)

    def linked(self, *ranks: int, seconds: float = 10.0) -> bool:
        """Whether rank 0 comes to have a line to these, and they to it."""
        peers = self.watches[0]._company.peers
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if all(peers[rank].link for rank in ranks) and all(watch._company.complete for watch in self.watches[1:]):
                return True
            time.sleep(0.01)
        return False

    def leave(self) -> None:
        for watch in reversed(self.watches):
            watch.leave()


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    if made.watches[0]._thread.is_alive():
        made.come(*({1, 2} - {watch._rank for watch in made.watches}))
        made.leave()


def challenge_to(connection: socket.socket) -> str:
    return str(json.loads(connection.makefile().readline())["challenge"])


def closed(connection: socket.socket) -> bool:
    """Whether the other end hangs up, whatever it has said before."""
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(1 << 16):
            pass
    return True


SAID = {
    "a rank that is a list": b'{"rank": []}\n',
    "a nested message": b"[" * 60_000 + b"\n",
    "a nested message without an end": b"[" * 60_000,
    "no message": b"GET / HTTP/1.1\r\n\r\n",
    "bytes": bytes(range(256)) * 8 + b"\n",
    "a number": b"9" * 5000 + b"\n",
    "not a number": b'{"rank": NaN}\n',
    "an old greeting": b'{"rank": 1, "host": "a", "pid": 1, "token": "x"}\n',
    "the death of a rank": b'{"ended": "its script ended by me"}\n',
    "the death of another": b'{"gone": {"rank": 1, "host": "a", "pid": 1, "how": "b"}}\n',
    "a farewell": b'{"left": true}\n',
    "a question": b'{"asked": true}\n',
}


def test_whatever_a_stranger_says_the_ranks_go_on(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    for said in SAID.values():
        for rank in (0, 1, 2):
            with world.connect() as connection, contextlib.suppress(OSError):
                connection.sendall(said.replace(b'"rank": 1', b'"rank": %d' % rank))
    world.come(1, 2)
    assert world.linked(1, 2)
    world.leave()
    assert capfd.readouterr().err == ""


def test_who_reads_the_store_cannot_speak_for_a_rank(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Nor can who has listened to a rank that got in: each proof is for one challenge."""
    watch = world.join(1)
    world.watches.append(watch)
    assert world.linked(1)
    known = [world.store.get(f"{KEY}/public/1").decode(), world.hub.public, ""]
    world.store.set(f"{KEY}/public/2", secret.Half().public)
    for key in [word.encode() for word in known] + [bytes.fromhex(known[0]) if len(known[0]) % 2 == 0 else b"x"]:
        for rank in (1, 2):
            with world.connect() as connection:
                mine = Greeting(rank, "stranger", 1, "", secret.challenge(), "")
                proof = mine.proven(key, challenge_to(connection))
                greeting = {**vars(mine), "proof": proof}
                connection.sendall(json.dumps(greeting).encode() + b'\n{"ended": "by a stranger"}\n')
                assert closed(connection)
    world.come(2)
    assert world.linked(1, 2)
    world.leave()
    assert capfd.readouterr().err == ""


def test_the_users_token_goes_into_the_key(
    world: World, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A rank without it is told what is wrong, is not watched, and is not accused."""
    monkeypatch.setenv(secret.TOKEN, "another")
    watch = world.join(1)
    watch._thread.join(10)
    assert not watch._thread.is_alive()
    said = capfd.readouterr().err
    assert "rank 1 is not watched: rank 0 and it have no secret in common. Set DSP_PLUGIN_WATCH_TOKEN" in said
    company = world.watches[0]._company
    assert company.excused(company.peers[1])
    watch.leave()
    company.peers[1].heard -= world.timeout
    monkeypatch.delenv(secret.TOKEN)
    world.come(2)
    assert world.linked(2)
    world.watches[0]._wake()
    world.leave()
    assert "is gone" not in capfd.readouterr().err


def test_nothing_secret_is_in_the_store(world: World) -> None:
    world.come(1)
    assert world.linked(1)
    keys = world.watches[0]._company, world.watches[1]._company
    key = keys[0]._half.key_with(keys[1]._half.public)
    assert key is not None
    kept = b"".join(world.store.get(name) for name in (KEY, f"{KEY}/public/1")).decode()
    assert json.loads(world.store.get(KEY)).keys() == {"host", "pid", "machine", "address", "port", "public"}
    assert key.hex() not in kept
    assert f"{keys[0]._half._exponent:x}" not in kept


def test_idle_connections_are_few_and_short(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than rank 0 may have descriptors: it keeps a few of them, and a rank still gets in."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit[1], 4096), limit[1]))
    with contextlib.ExitStack() as idle:
        idle.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limit)
        connections = [idle.enter_context(world.connect()) for _ in range(1100)]
        world.come(1, 2)
        assert world.linked(1, 2)
        # All that are left are hung up on once nobody else is to come.
        assert all(map(closed, connections))
    world.leave()


def test_a_stranger_who_says_nothing_is_sent_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_GREETING_SECONDS", 0.3)
    with world.connect() as connection:
        connection.settimeout(20)
        assert closed(connection)


def test_a_stranger_who_says_much_is_sent_away(world: World) -> None:
    with world.connect() as connection, contextlib.suppress(ConnectionError):
        connection.settimeout(20)
        for _ in range(100):
            connection.sendall(b" " * 1000)
            time.sleep(0.01)
        pytest.fail("nobody hung up")


def _out_of_descriptors() -> tuple[float, bool]:
    """Seconds that the process worked while it could not accept, and whether a rank got in afterwards."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    world = World(2)
    callers = [socket.socket() for _ in range(5)]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, most))
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            while True:
                held.callback(os.close, os.open("/dev/null", os.O_RDONLY))
        for caller in callers:
            caller.connect(("127.0.0.1", world.hub.port))
        before = time.process_time()
        time.sleep(1.5)
        spent = time.process_time() - before
    for caller in callers:
        caller.close()
    world.come(1)
    linked = world.linked(1)
    world.leave()
    return spent, linked


def test_without_descriptors_the_thread_waits_and_takes_ranks_in_later() -> None:
    [(spent, linked)] = spawn(_out_of_descriptors, 1)
    assert spent < 0.75, "it spun"
    assert linked


def test_the_port_is_open_only_until_all_are_there(world: World) -> None:
    world.come(1, 2)
    assert world.linked(1, 2)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            world.connect().close()
        except ConnectionRefusedError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("still open")


def test_a_line_that_is_garbled_ends_nothing(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a rank that is one: a word that cannot be read is no word."""
    world.come(1, 2)
    assert world.linked(1, 2)
    link = world.watches[1]._company.peers[0].link
    assert link is not None
    for said in SAID.values():
        if b"ended" not in said and b"gone" not in said and b"left" not in said:
            link._connection.setblocking(True)
            link._connection.sendall(said)
            link._connection.setblocking(False)
    link._connection.sendall(b"\n")
    # It is still heard: it can say farewell.
    world.leave()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "message",
    [
        {"rank": 1, "host": "a", "pid": 1},
        {"rank": 1, "host": "a", "pid": 1, "how": "b", "more": 1},
        {"rank": True, "host": "a", "pid": 1, "how": "b"},
        {"rank": -1, "host": "a", "pid": 1, "how": "b"},
        {"rank": 1.0, "host": "a", "pid": 1, "how": "b"},
        {"rank": 1 << 70, "host": "a", "pid": 1, "how": "b"},
        {"rank": 1, "host": ["a"], "pid": 1, "how": "b"},
        {"rank": 1, "host": "a" * 3000, "pid": 1, "how": "b"},
        [1, "a", 1, "b"],
        None,
    ],
)
def test_words_are_of_their_kind_and_size(message: object) -> None:
    assert words(Gone, message) is None
    assert words(Gone, {"rank": 1, "host": "a", "pid": 1, "how": "b"}) == Gone(1, "a", 1, "b")


def test_a_rank_that_knows_rank_0_by_another_address_finds_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.3")
    world.come(1, 2)
    assert world.linked(1, 2)
    world.leave()


@pytest.mark.parametrize("published", [b"[]", b"{}", b"x", b'{"host": 1}'])
def test_a_rank_that_is_told_nonsense_goes_on_unwatched(published: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    store = dist.HashStore()
    store.set(KEY, published.decode())
    assert Watch.join(store, 1, 2, 1.0, Latest()) is None
    assert "rank 1 is not watched: rank 0 has not said where it is" in capfd.readouterr().err


def test_a_rank_whose_rank_0_watches_nobody_goes_on_unwatched(capfd: pytest.CaptureFixture[str]) -> None:
    assert Watch.join(dist.HashStore(), 1, 2, 0.3, Latest()) is None
    assert "rank 1 is not watched: rank 0 has not said where it is" in capfd.readouterr().err


def test_rank_0_that_dies_before_it_lets_a_rank_in_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs up and is not to be found again."""
    named: list[Gone] = []

    def end(watch: Watch, gone: Gone) -> None:
        named.append(gone)
        watch._over = True
        watch._company.close()

    monkeypatch.setattr(Watch, "_end", end)
    store = dist.HashStore()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Hub("node0", 7, "", "127.0.0.1", listener.getsockname()[1], secret.Half().public).publish(store, KEY)
        watch = Watch.join(store, 1, 2, 60.0, Latest())
        assert watch is not None
        listener.accept()[0].close()
    watch._thread.join(20)
    assert [(gone.rank, gone.host, gone.pid) for gone in named] == [(0, "node0", 7)]
    assert "its process ended without a word" in named[0].how


def test_no_thread_is_left(world: World) -> None:
    world.come(1, 2)
    assert world.linked(1, 2)
    world.leave()
    assert "dsp_plugin liveness" not in [thread.name for thread in threading.enumerate()]
