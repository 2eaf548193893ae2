"""Numbers in the environment and on command lines: what is none is one clear error before anything runs."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from dsp_plugin import Axis, SequenceParallelConfig, SequenceParallelConfigError
from dsp_plugin.cli.app import app
from dsp_plugin.comm import agreement
from dsp_plugin.config.sizes import largest_ulysses_size
from dsp_plugin.integers import integer_of
from dsp_plugin.patches.cpu import torch_patches
from dsp_plugin.watch.liveness import seconds


@pytest.mark.parametrize("text", ["", " ", "two", "2.0", "-1", "0", "1e3", "٣", "9" * 30, "2 ranks"])
def test_a_node_of_no_number_of_ranks_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    for read in (lambda: SequenceParallelConfig(method="usp", size=8), torch_patches):
        with pytest.raises(SequenceParallelConfigError) as refused:
            read()
        for part in (f"environment variable LOCAL_WORLD_SIZE={text!r}", "no integer of 1 or more", "Unset it"):
            assert part in str(refused.value)


def test_numbers_of_the_environment_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert integer_of("LOCAL_WORLD_SIZE", 5) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    assert integer_of("LOCAL_WORLD_SIZE", 5, least=0) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "12")
    assert integer_of("LOCAL_WORLD_SIZE", 5) == 12


def test_the_largest_ulysses_size_is_that_of_trying_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    for node in (1, 4, 6, 100):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
        for size in range(1, 49):
            for heads in (None, 1, 2, 6, 8, 12):
                fitting = [u for u in range(1, size + 1) if size % u == 0 and u <= node and (heads or u) >= u]
                even = [u for u in fitting if heads is None or heads % u == 0]
                assert largest_ulysses_size(size, heads) == max(even or fitting)


@pytest.mark.parametrize("size", [2**20 + 1, 2**40, 10**400])
@pytest.mark.parametrize("key", ["size", "ulysses_size", "ring_size", "heads"])
def test_more_ranks_than_any_machine_has_are_refused(key: str, size: int) -> None:
    with pytest.raises(SequenceParallelConfigError, match=rf"{key}={size}: it is more than 1,048,576"):
        SequenceParallelConfig(**{"method": "usp", "size": 4, key: size})
    with pytest.raises(SequenceParallelConfigError, match=r"size=2097152: it is more than"):
        SequenceParallelConfig(method="usp", ulysses_size=2**20, ring_size=2)


@pytest.mark.parametrize("text", ["1e300", "inf", "nan", "-1", "soon", "2592001", ""])
def test_timeouts_that_no_clock_reaches_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SequenceParallelConfigError, match=r"--timeout=.*30 days"):
        seconds(text)
    monkeypatch.setenv("DSP_PLUGIN_DEBUG_TIMEOUT", text)
    with pytest.raises(SequenceParallelConfigError, match=r"DSP_PLUGIN_DEBUG_TIMEOUT=.*30 days"):
        agreement._timeout(Axis.alone("sp"))
    if text:
        monkeypatch.setenv("DSP_PLUGIN_TIMEOUT", text)
        with pytest.raises(SequenceParallelConfigError, match=r"DSP_PLUGIN_TIMEOUT=.*30 days"):
            seconds(None)


def test_a_timeout_of_thirty_days_is_one() -> None:
    assert seconds("2592000") == 2592000


@pytest.mark.parametrize("text", ["1e300", "inf", "nan", "0.5", "soon"])
@pytest.mark.parametrize(
    "command",
    [
        ["verify", "--method", "ulysses", "--size", "2"],
        ["plan-stages", "--model", "video_dit"],
        ["dry-run", "--model", "video_dit", "--method", "dsp"],
    ],
)
def test_timeouts_of_commands_too(command: list[str], text: str) -> None:
    done = CliRunner().invoke(app, [*command, "--timeout", text])
    assert done.exit_code == 2
    assert "--timeout" in done.output
    assert "Traceback" not in done.output
