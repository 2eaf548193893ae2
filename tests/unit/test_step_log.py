"""The step log's arithmetic, its line, and its writers."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError
from dsp_plugin.comm.meter import Meter
from dsp_plugin.mask import MaskSpec
from dsp_plugin.training.log_writers import in_units, line, scalars, tensorboard, wandb, writers
from dsp_plugin.training.step_log import StepRecord

RECORD = StepRecord(
    step=20,
    loss=2.5,
    seconds=0.5,
    tokens_per_second=12345.6,
    tflops=1.25,
    mfu=None,
    waiting=0.125,
    waiting_most=(0.25, 3),
    sent={"ulysses": 2048.0, "loss": 48.0, "ring": 0.0},
    memory=(3 << 20, 5 << 20, 4 << 20),
)


def test_the_line_names_what_there_is() -> None:
    text = line(RECORD)
    for part in (
        "step 20",
        "loss 2.500000",
        "12,346 tokens/s",
        "1.25 TFLOP/s a rank",
        "waited 0.125 s",
        "rank 3: 0.250 s",
        "ulysses 2.0 KiB, loss 48 B",
        "peak memory 5.0 MiB (rank 1)",
    ):
        assert part in text, text
    assert "MFU" not in text
    assert "ring" not in text
    assert "MFU 12.5 %" in line(replace(RECORD, mfu=0.125))
    assert "loss " not in line(replace(RECORD, loss=None)).split("sent by")[0]


def test_tensorboard_gets_every_number(tmp_path: Any) -> None:
    tensorboard(str(tmp_path))(RECORD)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    for name, value in scalars(RECORD).items():
        (event,) = events.Scalars(name)
        assert event.step == 20
        assert event.value == pytest.approx(value, rel=1e-6)
    assert "sequence_parallel/peak_memory_bytes/rank_2" in events.Tags()["scalars"]


@pytest.mark.parametrize("folder", ["occupied", "occupied/runs", "/proc/no/such"])
def test_a_folder_that_cannot_be_written_to_is_refused(folder: str, tmp_path: Any) -> None:
    (tmp_path / "occupied").touch()
    with pytest.raises(SequenceParallelConfigError, match=r"log_tensorboard=.*no event file can be written there: \w+"):
        writers(str(tmp_path / folder), None)


def test_wandb_logs_to_the_scripts_own_run_or_to_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict] = []
    started: list[str] = []

    def init(project: str) -> Any:
        started.append(project)
        package.run = SimpleNamespace(log=logged.append)
        return package.run

    package: Any = SimpleNamespace(run=None, init=init, __spec__=SimpleNamespace(name="wandb"))
    monkeypatch.setitem(sys.modules, "wandb", package)
    write = wandb("long-context")
    write(RECORD)
    write(RECORD)
    assert started == ["long-context"]
    assert len(logged) == 2
    assert logged[0]["sequence_parallel/loss"] == 2.5
    assert logged[0]["sequence_parallel/step"] == 20


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SequenceParallelConfigError, match=r"log_wandb='mine'.*pip install wandb"):
        writers(None, "mine")


@pytest.mark.parametrize("setting", [{"log_tensorboard": "runs"}, {"log_wandb": "mine"}, {"peak_tflops": 989.0}])
def test_what_belongs_to_a_log_needs_one(setting: dict) -> None:
    with pytest.raises(SequenceParallelConfigError, match="log_every is 0"):
        SequenceParallelConfig(method="ulysses", size=2, **setting)
    assert SequenceParallelConfig(method="ulysses", size=2, log_every=5, **setting).log_every == 5


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5120.0 GiB")])
def test_units(size: int, text: str) -> None:
    assert in_units(size) == text


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, (3, 0), (None, 2), (4, 5), (40, 40), (0, 0)])
@pytest.mark.parametrize("borders", [None, (0, 3, 3, 11, 17)])
def test_pairs_are_those_of_the_dense_mask(causal: bool, window: Any, borders: Any) -> None:
    mask, length = MaskSpec(causal, window, borders), 17
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    left, right = mask.band()
    seen = torch.ones(length, length, dtype=torch.bool)
    seen &= (i - j <= left) if left is not None else True
    seen &= (j - i <= right) if right is not None else True
    if borders is not None:
        ends = torch.tensor(borders[1:])
        document = torch.searchsorted(ends, torch.arange(length), right=True)
        seen &= document[:, None] == document[None]
    assert mask.pairs(length) == int(seen.sum())


class _Event:
    """A device's event, done when told so."""

    def __init__(self, at: float, done: bool = True) -> None:
        self.at, self.done = at, done

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True

    def elapsed_time(self, end: _Event) -> float:
        assert self.done
        assert end.done
        return end.at - self.at


def test_events_of_a_device_are_added_up_as_they_are_done() -> None:
    counted = Meter()
    pairs = [(_Event(0.0), _Event(5.0)), (_Event(9.0), _Event(12.0, done=False))]
    counted._events = list(pairs)
    counted.fold()
    assert counted._events == pairs[1:]
    assert counted.waited() == pytest.approx(0.008)
    assert counted._events == []
    assert counted.waited() == pytest.approx(0.008)
    counted.clear()
    assert counted.waited() == 0.0
