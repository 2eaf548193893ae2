"""Claims about a rank that dies: the others end by themselves, without an agent, and say which rank it was."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from failing_ranks import Ranks, ranks

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.watch.last_words import STATUS, lost, timed_out
from dsp_plugin.watch.liveness import DEFAULT_TIMEOUT, TIMEOUT, seconds

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

SLACK = 30.0
"""Seconds in which a process of a contended machine gets to run."""


def assert_named(world: Ranks, gone: int, *words: str, size: int = 3) -> None:
    """Every other rank has ended for the sake of this one and has said so, with its own place."""
    survivors = [rank for rank in range(size) if rank != gone]
    assert world.statuses(*survivors) == [STATUS] * len(survivors), world.outputs()
    for rank in survivors:
        said = world.output(rank)
        pid = world.processes[gone].pid
        assert re.search(rf"^dsp_plugin: rank {gone} \(host \S+, pid {pid}\) is gone: ", said, re.MULTILINE), said
        assert f"Rank {rank} (host " in said, said
        assert re.search(r"(all_to_all|ring_hop|all_gather) of \w+ \(forward, group sp, [\d,]+ bytes\)", said), said
        assert "exchanging_script.py" in said, said
        assert all(word in said for word in words), said
        assert said.count("is gone") == 1, said


@pytest.mark.parametrize("gone", [1, 0])
def test_a_killed_rank_is_named_at_once(gone: int, tmp_path: Path) -> None:
    """Long before the timeout: its kernel tells."""
    with ranks(tmp_path, 3, timeout=200.0) as world:
        world.under_way()
        world.send(gone, signal.SIGKILL)
        started = time.monotonic()
        assert_named(world, gone, "ended without a word", "SIGKILL")
        assert time.monotonic() - started < SLACK
        assert world.statuses(gone) == [-signal.SIGKILL]


@pytest.mark.parametrize("gone", [1, pytest.param(0, marks=pytest.mark.matrix)])
def test_a_rank_that_is_silent_is_named_after_the_timeout(gone: int, tmp_path: Path) -> None:
    """As a host without power: nothing is closed, and the others wait in a collective. Awake again, it ends too."""
    with ranks(tmp_path, 3, timeout=4.0) as world:
        world.under_way()
        world.send(gone, signal.SIGSTOP)
        started = time.monotonic()
        assert_named(world, gone, "silent for")
        assert 3.0 < time.monotonic() - started < 4.0 + SLACK
        world.send(gone, signal.SIGCONT)
        assert world.statuses(gone) == [STATUS], world.outputs()
        assert "is gone" in world.output(gone)


@pytest.mark.matrix
def test_a_slow_rank_is_not_accused(tmp_path: Path) -> None:
    with ranks(tmp_path, 3, timeout=20.0) as world:
        world.under_way()
        world.send(1, signal.SIGSTOP)
        time.sleep(8.0)
        world.send(1, signal.SIGCONT)
        time.sleep(2.0)
        world.stop()
        assert world.statuses(0, 1, 2) == [0, 0, 0], world.outputs()
        assert "is gone" not in world.outputs()


@pytest.mark.matrix
def test_a_machine_that_slept_accuses_nobody(tmp_path: Path) -> None:
    """All ranks stand still for longer than the timeout, as in a frozen container: that is no rank's silence."""
    with ranks(tmp_path, 3, timeout=3.0) as world:
        world.under_way()
        for number, pause in ((signal.SIGSTOP, 6.0), (signal.SIGCONT, 2.0)):
            for rank in range(3):
                world.send(rank, number)
            time.sleep(pause)
        world.stop()
        assert world.statuses(0, 1, 2) == [0, 0, 0], world.outputs()


@pytest.mark.parametrize(
    ("gone", "way", "status", "words"),
    [
        (1, "raise", 1, "its script ended by ValueError: the learning rate is blue"),
        pytest.param(0, "raise", 1, "its script ended by ValueError", marks=pytest.mark.matrix),
        pytest.param(2, "exit", 3, "its script ended by SystemExit: 3", marks=pytest.mark.matrix),
    ],
)
def test_a_failed_script_is_named_with_its_error(gone: int, way: str, status: int, words: str, tmp_path: Path) -> None:
    with ranks(tmp_path, 3, str(gone), way, timeout=200.0) as world:
        assert_named(world, gone, words)
        assert world.statuses(gone) == [status]
        assert ("Traceback" in world.output(gone)) == (way == "raise")
        assert "is gone" not in world.output(gone)


def test_an_error_of_all_ranks_is_nobodys_fault(tmp_path: Path) -> None:
    """A setting that every rank refuses: each shows its own error, and none blames another."""
    with ranks(tmp_path, 3, "0", "raise together", timeout=200.0) as world:
        assert world.statuses(0, 1, 2) == [1, 1, 1], world.outputs()
        assert "is gone" not in world.outputs()
        assert world.outputs().count("ValueError: the learning rate is blue") == 3


def test_a_child_process_does_not_keep_a_killed_rank_alive(tmp_path: Path) -> None:
    """As a worker of a DataLoader would, which has its parent's connections."""
    with ranks(tmp_path, 3, "1", "fork", timeout=200.0) as world:
        world.under_way()
        world.send(1, signal.SIGKILL)
        started = time.monotonic()
        assert_named(world, 1, "ended without a word")
        assert time.monotonic() - started < 15.0, "the child had to end first"


@pytest.mark.matrix
def test_a_terminated_rank_is_named(tmp_path: Path) -> None:
    with ranks(tmp_path, 3, timeout=200.0) as world:
        world.under_way()
        world.send(1, signal.SIGTERM)
        assert_named(world, 1, "SIGTERM")
        assert world.statuses(1) == [128 + signal.SIGTERM]


@pytest.mark.parametrize("early", [0, pytest.param(1, marks=pytest.mark.matrix)])
def test_ranks_may_end_at_different_times(early: int, tmp_path: Path) -> None:
    with ranks(tmp_path, 3, str(early), "return", timeout=200.0) as world:
        assert world.statuses(0, 1, 2) == [0, 0, 0], world.outputs()
        assert "dsp_plugin" not in world.outputs()


def test_the_timeout_is_the_flag_or_the_environment_or_five_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TIMEOUT, raising=False)
    assert (seconds(None), seconds("7.5"), seconds("0")) == (DEFAULT_TIMEOUT, 7.5, 0.0)
    monkeypatch.setenv(TIMEOUT, "30")
    assert (seconds(None), seconds("7")) == (30.0, 7.0)
    for wrong in ("soon", "-1", "inf", "nan", ""):
        with pytest.raises(SequenceParallelConfigError, match=r"--timeout.*not a number of seconds.*0 watches nobody"):
            seconds(wrong)
    monkeypatch.setenv(TIMEOUT, "5 min")
    with pytest.raises(SequenceParallelConfigError, match=TIMEOUT):
        seconds(None)


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("[pair.cc:537] Read error [127.0.0.1]:17793: Connection reset by peer.", (True, False)),
        ("[pair.cc:534] Connection closed by peer [127.0.0.1]:2", (True, False)),
        ("NCCL Error 6: remote process exited or there was a network error", (True, False)),
        ("[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete", (False, True)),
        ("CUDA out of memory", (False, False)),
        ("", (False, False)),
    ],
)
def test_an_error_that_another_rank_caused_is_known_by_its_words(text: str, marks: tuple[bool, bool]) -> None:
    def of(error: Exception) -> tuple[bool, bool]:
        return lost(error), timed_out(error)

    assert of(RuntimeError(text)) == marks
    wrapped = ValueError("step 3 failed")
    wrapped.__cause__ = RuntimeError(text)
    assert of(wrapped) == marks
    assert of(ValueError(text)) == (False, False), "not an error of a collective"


@pytest.mark.parametrize(("size", "timeout"), [(1, 200.0), (2, 0.0)])
def test_nobody_is_watched_alone_or_on_request(size: int, timeout: float, tmp_path: Path) -> None:
    with ranks(tmp_path, size, "0", "threads", timeout=timeout) as world:
        assert world.statuses(*range(size)) == [0] * size, world.outputs()
        assert "liveness" not in world.output(0), world.outputs()


NOBODY_THERE = """
import socket
import time
import torch.distributed as dist
from dsp_plugin.watch.door import Hub
from dsp_plugin.watch.last_words import Latest
from dsp_plugin.watch.liveness import Watch
from dsp_plugin.watch.secret import Half

store = dist.HashStore()
with socket.create_server(("127.0.0.1", 0)) as listener:
    port = listener.getsockname()[1]
Hub("host", 1, "", "127.0.0.1", port, Half().public).publish(store, "dsp_plugin/liveness")
assert Watch.join(store, 1, 2, 0.5, Latest()) is None
watch = Watch.join(store, 0, 2, 0.5, Latest())
time.sleep(1.5)
watch.leave()
"""


def test_a_rank_that_cannot_reach_rank_0_is_not_accused() -> None:
    """It says so, and the job goes on without a watch on it."""
    environment = {"MASTER_ADDR": "127.0.0.1", "PATH": ""}
    ended = subprocess.run(
        [sys.executable, "-c", NOBODY_THERE], env=environment, capture_output=True, text=True, timeout=100
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("\n") == 1
    assert re.match(
        r"dsp_plugin: rank 1 is not watched: it cannot reach rank 0 at port \d+ of 127.0.0.1 ", ended.stderr
    )
