"""Claims about training that loses a rank: torchrun or a user starts it again, and it ends as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from elastic_runs import ROOT, Run, losses, torchrun
from failing_ranks import SCRIPT as EXCHANGING_SCRIPT
from failing_ranks import free_port

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

STEPS, SAVE_EVERY, KILLED_AFTER = 20, 3, 6
DEEPSPEED_SCRIPT = ROOT / "launch" / "examples" / "train_linear_deepspeed.py"
MEGATRON_SCRIPT = ROOT / "launch" / "examples" / "pretrain_gpt_core.py"
ONE_RESTART = ("--standalone", "--max-restarts", "1")
GOES_ON = re.compile(r"going on after step (\d+)")


def deepspeed_arguments(folder: Path, name: str, method: str, size: int) -> list[str]:
    """A small model; the metrics go to ``folder/name.json``, checkpoints to ``folder/name``."""
    config = json.loads((ROOT / "configs" / "deepspeed" / "linear_lasp_zero1.json").read_text())
    config["sequence_parallel"] = {"method": method, "size": size}
    path = folder / f"{method}_{size}.json"
    path.write_text(json.dumps(config))
    model = ["--width", "32", "--layers", "2", "--seq-length", "128"]
    run = ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--checkpoint", str(folder / name)]
    return ["--deepspeed_config", str(path), *model, *run, "--metrics-out", str(folder / f"{name}.json")]


def megatron_arguments(folder: Path, name: str, *sizes: str) -> list[str]:
    """Likewise."""
    model = ["--num-layers", "2", "--hidden-size", "32", "--seq-length", "64", "--sp-method", "ring"]
    run = ["--train-iters", str(STEPS), "--save-every", str(SAVE_EVERY), "--checkpoint", str(folder / name)]
    return [*model, *sizes, *run, "--metrics-out", str(folder / f"{name}.json")]


def deepspeed_trains_on(folder: Path) -> Callable[[Run], bool]:
    """Whether the run is in a step after a checkpoint that is whole."""

    def when(run: Run) -> bool:
        latest = folder / "latest"
        if not latest.exists() or time.time() - latest.stat().st_mtime < 0.05:
            return False
        return int(latest.read_text().strip().removeprefix("global_step") or 0) >= KILLED_AFTER

    return when


def megatron_trains_on(run: Run) -> bool:
    """Likewise: the step after the one that it has printed, between two checkpoints."""
    return f"step {KILLED_AFTER + 1}/{STEPS} |" in run.output()


def assert_named(run: Run, gone: int, pid: int, size: int) -> None:
    """Every other rank has said who is gone."""
    said = run.output()
    assert len(re.findall(rf"^dsp_plugin: rank {gone} \(host \S+, pid {pid}\) is gone: ", said, re.M)) == size - 1, said
    for rank in set(range(size)) - {gone}:
        assert re.search(rf"^  Rank {rank} \(host \S+, pid \d+\) ends with status 75", said, re.M), said


def assert_went_on(run: Run) -> None:
    """Not from the start."""
    assert max(map(int, GOES_ON.findall(run.output())), default=0) >= KILLED_AFTER, run.output()


@pytest.mark.matrix
@pytest.mark.deepspeed
def test_deepspeed_goes_on_after_a_kill(tmp_path: Path) -> None:
    """On shared memory that the killed run left as it was."""
    pytest.importorskip("deepspeed")
    argv = deepspeed_arguments(tmp_path, "whole", "lasp", 2)
    with torchrun(tmp_path / "whole.log", 2, DEEPSPEED_SCRIPT, *argv) as run:
        assert run.status() == 0, run.output()
    argv = deepspeed_arguments(tmp_path, "killed", "lasp", 2)
    with torchrun(tmp_path / "killed.log", 2, DEEPSPEED_SCRIPT, *argv, options=ONE_RESTART) as run:
        pid = run.kill_rank(1, deepspeed_trains_on(tmp_path / "killed"))
        assert run.status() == 0, run.output()
        assert_named(run, 1, pid, 2)
        assert_went_on(run)
    expected = losses(tmp_path / "whole.json")
    assert len(expected) == STEPS
    assert losses(tmp_path / "killed.json") == expected
    assert expected[-1] < expected[0]


@pytest.mark.deepspeed
@pytest.mark.matrix
def test_deepspeed_goes_on_with_another_size(tmp_path: Path) -> None:
    """Killed with a sequence on 4 ranks, started again by hand with 2 on each of two."""
    pytest.importorskip("deepspeed")
    argv = deepspeed_arguments(tmp_path, "whole", "lasp", 4)
    with torchrun(tmp_path / "whole.log", 4, DEEPSPEED_SCRIPT, *argv) as run:
        assert run.status() == 0, run.output()
    argv = deepspeed_arguments(tmp_path, "killed", "lasp", 4)
    with torchrun(tmp_path / "killed.log", 4, DEEPSPEED_SCRIPT, *argv) as run:
        pid = run.kill_rank(2, deepspeed_trains_on(tmp_path / "killed"))
        assert run.status() != 0
        assert_named(run, 2, pid, 4)
    argv = deepspeed_arguments(tmp_path, "killed", "lasp", 2)
    with torchrun(tmp_path / "again.log", 4, DEEPSPEED_SCRIPT, *argv) as run:
        assert run.status() == 0, run.output()
        assert_went_on(run)
    assert losses(tmp_path / "killed.json") == pytest.approx(losses(tmp_path / "whole.json"), rel=1e-6)


@pytest.mark.megatron
@pytest.mark.matrix
def test_megatron_goes_on_after_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    sizes = ("--tensor-model-parallel-size", "2", "--context-parallel-size", "2")
    with torchrun(tmp_path / "whole.log", 4, MEGATRON_SCRIPT, *megatron_arguments(tmp_path, "whole", *sizes)) as run:
        assert run.status() == 0, run.output()
    argv = megatron_arguments(tmp_path, "killed", *sizes)
    with torchrun(tmp_path / "killed.log", 4, MEGATRON_SCRIPT, *argv, options=ONE_RESTART) as run:
        pid = run.kill_rank(3, megatron_trains_on)
        assert run.status() == 0, run.output()
        assert_named(run, 3, pid, 4)
        assert run.output().count(f"step 1/{STEPS} |") == 1, "it started from the beginning again"
    expected = losses(tmp_path / "whole.json")
    assert len(expected) == STEPS
    assert losses(tmp_path / "killed.json") == expected


@pytest.mark.megatron
@pytest.mark.matrix
def test_megatron_goes_on_with_another_size(tmp_path: Path) -> None:
    """Rank 0 killed with a sequence on 2 ranks; started again by hand with a sequence on each."""
    pytest.importorskip("megatron.core")
    pair, alone = ("--context-parallel-size", "2"), ("--context-parallel-size", "1")
    with torchrun(tmp_path / "whole.log", 2, MEGATRON_SCRIPT, *megatron_arguments(tmp_path, "whole", *pair)) as run:
        assert run.status() == 0, run.output()
    argv = megatron_arguments(tmp_path, "killed", *pair)
    with torchrun(tmp_path / "killed.log", 2, MEGATRON_SCRIPT, *argv) as run:
        pid = run.kill_rank(0, megatron_trains_on)
        assert run.status() != 0
        assert_named(run, 0, pid, 2)
    argv = megatron_arguments(tmp_path, "killed", *alone)
    with torchrun(tmp_path / "again.log", 2, MEGATRON_SCRIPT, *argv) as run:
        assert run.status() == 0, run.output()
        assert f"step {KILLED_AFTER + 1}/{STEPS} |" in run.output()
        assert f"step {KILLED_AFTER}/{STEPS} |" not in run.output(), "it started from the beginning"
    whole, again = losses(tmp_path / "whole.json"), losses(tmp_path / "killed.json")
    assert len(whole) == STEPS
    assert again == pytest.approx(whole, rel=1e-6)
    assert whole[-1] < whole[0]


@pytest.mark.matrix
def test_agents_of_two_nodes_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank killed under one: the other's says so, and both begin again without it."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    endpoint = f"127.0.0.1:{free_port()}"
    rendezvous = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--max-restarts", "2")
    pids = [tmp_path / f"{rank}.pid" for rank in range(2)]
    with contextlib.ExitStack() as agents:
        runs = [
            agents.enter_context(
                torchrun(tmp_path / f"node{node}.log", 1, EXCHANGING_SCRIPT, str(tmp_path), options=rendezvous)
            )
            for node in range(2)
        ]
        printed = lambda: "\n".join(run.output() for run in runs)  # noqa: E731
        wait_until(lambda: all(pid.exists() for pid in pids), printed)
        first = [int(pid.read_text()) for pid in pids]
        os.kill(first[1], signal.SIGKILL)
        wait_until(lambda: not set(first) & {int(pid.read_text() or first[0]) for pid in pids}, printed)
        (tmp_path / "stop").touch()
        assert [run.status() for run in runs] == [0, 0], printed()
        named = rf"^dsp_plugin: rank 1 \(host \S+, pid {first[1]}\) is gone: "
        assert len(re.findall(named, printed(), re.M)) == 1, printed()


def wait_until(holds: Callable[[], bool], printed: Callable[[], str], seconds: float = 120.0) -> None:
    """Returns once it holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, printed()
        time.sleep(0.05)
