"""A rank that no new start would help ends the agent that would start it, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from dsp_plugin.patches import restarts

AGENT = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "1", "LOCAL_RANK": "0"}


def ended(monkeypatch: pytest.MonkeyPatch, parent: list[str], environment: dict[str, str]) -> bool:
    """Whether a parent with this command line gets SIGTERM."""
    sent: list[tuple[int, int]] = []
    waiting = "import sys; print(); sys.stdout.flush(); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", waiting, *parent], **pipes)
    assert process.stdout is not None
    # Until it runs, it has no command line.
    process.stdout.readline()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "getppid", lambda: process.pid)
            patched.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
            restarts.forgo(environment)
    finally:
        process.communicate()
    assert sent in ([], [(process.pid, signal.SIGTERM)])
    return bool(sent)


@pytest.mark.parametrize("parent", ["/usr/bin/torchrun", "torch.distributed.run", "/usr/bin/accelerate"])
def test_an_agent_with_restarts_left_is_ended(
    parent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch, [parent], AGENT)
    assert "with 2 restarts left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("parent", "change"),
    [
        (["bash"], {}),
        (["torchrun"], {"LOCAL_RANK": "1"}),
        (["torchrun"], {"TORCHELASTIC_RESTART_COUNT": "3"}),
        (["torchrun"], {"TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RESTART_COUNT": "0"}),
    ],
)
def test_nothing_else_is(parent: list[str], change: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell between the two; another rank of the node has done it; no restart is left."""
    assert not ended(monkeypatch, parent, {**AGENT, **change})


def test_a_rank_without_an_agent_ends_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ended(monkeypatch, ["torchrun"], {})
