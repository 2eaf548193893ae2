"""Claims about a run that is killed inside a save: what it had saved before is whole, and it goes on from there."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from elastic_runs import ROOT, Run, losses, torchrun

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.distributed, pytest.mark.deepspeed, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("killed_in_save.py")
EXAMPLE = ROOT / "launch" / "examples" / "train_linear_deepspeed.py"
STEPS, SAVE_EVERY, KILLED_AT = 5, 2, 4
FOLDER = "checkpoints"
MODEL, SHARD = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
POINTS = [
    *((0, point) for point in ("open .sequence_parallel_files.json.", "rename sequence_parallel_files.json")),
    *((0, f"{when} {MODEL}") for when in ("before", "half", "after")),
    *((0, f"{when} {SHARD.format(0)}") for when in ("half", "after")),
    *((1, f"{when} {SHARD.format(1)}") for when in ("before", "half", "after", "fsync")),
    *((0, f"fsync {name}") for name in (MODEL, SHARD.format(0))),
    *((0, point) for point in ("open .sequence_parallel_files.json.#2", "fsync .sequence_parallel_files.json.#2")),
    *((0, point) for point in ("rename sequence_parallel_files.json#2", "open .latest.", "fsync .latest.")),
    *((0, point) for point in ("rename latest", f"fsync {FOLDER}#2")),
]


@dataclass(frozen=True)
class Whole:
    """A run that nobody kills: its folder, and the loss of every step."""

    folder: Path
    losses: list[float]


def arguments(folder: Path, kills: list[tuple[int, int, str]]) -> list[str]:
    """Of the script that kills, and of the example below it, whose checkpoints and metrics go to the folder."""
    folder.mkdir()
    config = folder / "config.json"
    settings = json.loads((ROOT / "configs" / "deepspeed" / "linear_lasp_zero1.json").read_text())
    config.write_text(json.dumps({**settings, "sequence_parallel": {"method": "lasp", "size": 2}}))
    model = ["--width", "32", "--layers", "2", "--seq-length", "128"]
    run = ["--steps", str(STEPS), "--save-every", str(SAVE_EVERY), "--checkpoint", str(folder / FOLDER)]
    example = [str(EXAMPLE), "--deepspeed_config", str(config), *model, *run]
    return [json.dumps(kills), str(folder / FOLDER), *example, "--metrics-out", str(folder / "metrics.json")]


def restarts(count: int) -> tuple[str, ...]:
    """torchrun's options."""
    return ("--standalone", "--max-restarts", str(count))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """It meets every point."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    argv = arguments(folder, [])
    with torchrun(folder / "log", 2, SCRIPT, *argv) as run:
        assert run.status() == 0, run.output()
    met = [(rank, point) for rank in range(2) for point in json.loads((folder / f"points.{rank}.json").read_text())]
    assert not set(POINTS) - set(met), met
    found = losses(folder / "metrics.json")
    assert len(found) == STEPS
    assert found[-1] < found[0]
    return Whole(folder, found)


def killed(folder: Path, kills: list[tuple[int, str]]) -> Run:
    """A run whose starts are killed at these points, each in the save of the same step; it has ended well."""
    argv = arguments(folder, [(rank, KILLED_AT, point) for rank, point in kills])
    with torchrun(folder / "log", 2, SCRIPT, *argv, options=restarts(len(kills))) as run:
        assert run.status() == 0, run.output()
    said = run.output()
    assert re.findall(r"^dsp_plugin: rank (\d) .* is gone: its process ended without a word", said, re.M) == [
        str(rank) for rank, _ in kills
    ], said
    return run


def test_a_save_that_is_cut_is_never_the_last(tmp_path: Path, whole: Whole) -> None:
    """Where DeepSpeed's rank 0 would have named it: rank 1 ends in the middle of its shard."""
    run = killed(tmp_path / "run", [(1, f"half {SHARD.format(1)}")])
    assert re.findall(r"going on after step (\d+)", run.output()) == [str(SAVE_EVERY)], run.output()
    assert losses(tmp_path / "run" / "metrics.json") == whole.losses


@pytest.mark.matrix
def test_a_save_that_is_cut_again_is_not_either(tmp_path: Path, whole: Whole) -> None:
    """The second start meets the files that the first has left."""
    run = killed(tmp_path / "run", [(1, f"half {SHARD.format(1)}"), (0, "rename latest")])
    assert re.findall(r"going on after step (\d+)", run.output()) == [str(SAVE_EVERY)] * 2, run.output()
    assert losses(tmp_path / "run" / "metrics.json") == whole.losses


@pytest.mark.matrix
@pytest.mark.parametrize(("rank", "point"), POINTS)
def test_a_kill_at_any_point_of_a_save_changes_no_loss(rank: int, point: str, tmp_path: Path, whole: Whole) -> None:
    run = killed(tmp_path / "run", [(rank, point)])
    named = rank == 0 and point == f"fsync {FOLDER}#2"
    expected = KILLED_AT if named else SAVE_EVERY
    assert re.findall(r"going on after step (\d+)", run.output()) == [str(expected)], run.output()
    assert losses(tmp_path / "run" / "metrics.json") == whole.losses


def test_a_damaged_checkpoint_ends_a_job_that_would_start_again(tmp_path: Path, whole: Whole) -> None:
    """No other is whole: the first start says which file it is, and torchrun does not try another."""
    argv = arguments(tmp_path / "run", [])
    for tag in (SAVE_EVERY, KILLED_AT):
        shutil.copytree(whole.folder / FOLDER / f"global_step{tag}", tmp_path / "run" / FOLDER / f"global_step{tag}")
        os.truncate(tmp_path / "run" / FOLDER / f"global_step{tag}" / SHARD.format(1), 1000)
    shutil.copy(whole.folder / FOLDER / "latest", tmp_path / "run" / FOLDER)
    with torchrun(tmp_path / "log", 2, SCRIPT, *argv, options=restarts(3)) as run:
        assert run.status() != 0
    said = run.output()
    file = tmp_path / "run" / FOLDER / f"global_step{KILLED_AT}" / SHARD.format(1)
    assert f"DamagedCheckpointError: the checkpoint {file.parent} is not whole: {file}: it has 1,000 bytes" in said, (
        said
    )
    assert f"No other checkpoint in {file.parents[1]} is known to be whole" in said, said
    assert said.count("another start would end alike: torchrun") == 1, said
    assert said.count("with 3 restarts left") == 1, said
