"""How much host memory checkpoints may take: what a machine has, what its ranks ask for, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError, SequenceParallelGroups
from dsp_plugin.training import host_budget
from dsp_plugin.training.host_budget import host_bytes_free, local_ranks, offload_for

AXIS = SequenceParallelGroups.single().sp
GIB = 1 << 30


@pytest.fixture(autouse=True)
def _a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks, with 10 GiB to spare."""
    monkeypatch.setattr(host_budget, "host_bytes_free", lambda: 10 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


def test_an_amount_that_all_ranks_of_a_machine_can_have_is_the_limit() -> None:
    offload = offload_for(5 * GIB, AXIS)
    assert offload is not None
    assert offload.pool.limit == 5 * GIB


def test_more_than_the_machine_has_is_refused_with_the_arithmetic() -> None:
    words = (
        rf"2 ranks on this machine may take {12 * GIB} bytes of host memory, and {10 * GIB} are free.* {9 * GIB // 2} b"
    )
    with pytest.raises(SequenceParallelConfigError, match=words):
        offload_for(6 * GIB, AXIS)


def test_true_is_a_ranks_share() -> None:
    offload = offload_for(True, AXIS)
    assert offload is not None
    assert offload.pool.limit == 9 * GIB // 2


def test_nothing_is_asked_for_by_default_and_by_auto_on_cpu() -> None:
    config = SequenceParallelConfig(method="ulysses", size=2)
    assert offload_for(config.offload, AXIS) is None
    assert offload_for(SequenceParallelConfig(method="ulysses", size=2, memory="auto").offload, AXIS) is None


def test_the_setting_reads_amounts() -> None:
    config = SequenceParallelConfig(method="ulysses", size=2, memory={"offload": "4GiB"})
    offload = offload_for(config.offload, AXIS)
    assert offload is not None
    assert offload.pool.limit == 4 * GIB


def test_what_is_free_is_the_least_that_kernel_and_container_say(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  8000 kB\nMemAvailable:  4000 kB\n")
    assert host_bytes_free(meminfo, tmp_path) == 4000 * 1024
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert host_bytes_free(meminfo, tmp_path) == 2000000
    (tmp_path / "memory.max").write_text("max\n")
    assert host_bytes_free(meminfo, tmp_path) == 4000 * 1024
    assert host_bytes_free(tmp_path / "none", tmp_path) is None


def test_ranks_of_a_machine_are_as_launchers_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_ranks() == 2
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert local_ranks() == 4
    monkeypatch.delenv("LOCAL_SIZE")
    assert local_ranks() == 1
