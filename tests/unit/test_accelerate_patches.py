"""accelerate with a section: what it is told, what it refuses, and that it is as ever without one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import ParallelismConfig
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.patches import accelerate
from dsp_plugin.patches.accelerate.replicas import folded, writes_here

pytestmark = pytest.mark.deepspeed


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def config(size: int = 1, **more: Any) -> dict[str, Any]:
    """Of DeepSpeed, with our section."""
    return {"sequence_parallel": {"method": "ring", "size": size}, **more}


def test_the_world_is_folded_whether_it_or_the_config_comes_first() -> None:
    HfDeepSpeedConfig(config())
    assert folded() is None
    PartialState(cpu=True)
    assert folded() is not None
    AcceleratorState._reset_state(reset_partial_state=True)
    assert folded() is None
    PartialState(cpu=True)
    assert folded() is None
    HfDeepSpeedConfig(config())
    assert folded() is not None
    assert PartialState().num_processes == 1
    assert PartialState().is_main_process
    assert writes_here()


def test_a_config_without_a_section_changes_nothing() -> None:
    HfDeepSpeedConfig({"train_batch_size": 2})
    PartialState(cpu=True)
    assert folded() is None
    assert PartialState().is_main_process
    assert PartialState().is_last_process
    assert not PartialState().use_distributed


def test_a_size_that_does_not_divide_the_world_is_refused() -> None:
    PartialState(cpu=True)
    with pytest.raises(SequenceParallelConfigError, match="does not divide the 1 ranks"):
        HfDeepSpeedConfig(config(size=2))
    assert folded() is None


def test_sections_of_two_sizes_are_refused() -> None:
    HfDeepSpeedConfig(config(size=1))
    with pytest.raises(SequenceParallelConfigError, match="same size"):
        HfDeepSpeedConfig(config(size=2))


def test_a_misnamed_section_is_refused() -> None:
    with pytest.raises(SequenceParallelConfigError, match="would train unsharded"):
        HfDeepSpeedConfig({"SEQUENCE_PARALLEL": {"method": "ring", "size": 2}})


def test_tensor_parallelism_of_deepspeed_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="autotp_size"):
        HfDeepSpeedConfig(config(tensor_parallel={"autotp_size": 2}))


@pytest.mark.parametrize("name", ["cp_size", "tp_size"])
def test_a_mesh_of_accelerates_own_is_refused(name: str) -> None:
    PartialState(cpu=True)
    HfDeepSpeedConfig(config())
    with pytest.raises(SequenceParallelConfigError, match=f"ParallelismConfig.{name}"):
        Accelerator(cpu=True, parallelism_config=ParallelismConfig(**{name: 2}))


def test_a_newer_version_is_named_in_a_warning_and_runs() -> None:
    (first, *_) = accelerate.PATCHES
    first.revert()
    with pytest.warns(RuntimeWarning, match="newer than 0.1"):
        replace(first, tested="0.1").apply()
    first.revert()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.apply()
    assert accelerate.PATCHES.applied
