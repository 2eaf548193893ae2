"""accelerate with a section: what it is told, what it refuses, and that it is as ever without one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("deepspeed")

import deepspeed
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
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


def test_the_section_that_a_run_is_told_folds_every_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSP_PLUGIN_SECTION", json.dumps(config()["sequence_parallel"]))
    for _ in range(2):
        PartialState(cpu=True)
        assert folded() is not None
        AcceleratorState._reset_state(reset_partial_state=True)
        assert folded() is None


@pytest.mark.parametrize("with_section", [False, True])
def test_deepspeed_beside_a_section_that_the_run_is_told_is_refused(
    with_section: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSP_PLUGIN_SECTION", json.dumps(config()["sequence_parallel"]))
    ds_config = config() if with_section else {"train_batch_size": 2}
    said = "has a .* section as well" if with_section else "where its section belongs"
    with pytest.raises(SequenceParallelConfigError, match=said):
        HfDeepSpeedConfig(ds_config)
    with pytest.raises(SequenceParallelConfigError, match=said):
        deepspeed.initialize(model=torch.nn.Linear(2, 2), config=ds_config)


def test_wrappers_that_are_not_served_are_refused_beside_a_told_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSP_PLUGIN_SECTION", json.dumps(config()["sequence_parallel"]))
    with pytest.raises(SequenceParallelConfigError, match=r"dp_shard_size=2.*over all ranks by themselves"):
        Accelerator(cpu=True, parallelism_config=ParallelismConfig(dp_shard_size=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    state = Accelerator(cpu=True).state
    # As it is on accelerators, to which accelerate gives FSDP alone.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    AcceleratorState(_from_accelerator=True)
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(UnsupportedError, match=r"fsdp_version=1.*Set fsdp_version to 2"):
        AcceleratorState(_from_accelerator=True)
