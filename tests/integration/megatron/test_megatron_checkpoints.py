"""A run that stops and goes on with other methods, sizes and optimizers has the losses of one that never stopped.

fp32, two of five steps before the stop; weights, optimizer and place in the data come from the checkpoint. The
reference is one rank of stock Megatron that trains all five steps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cores import EVERY, NEWEST, OLDEST
from megatron_runs import CP2, CP4, PP2, TP2, VPP2, Run, model_arguments, train, worlds

pytestmark = pytest.mark.timeout(600)

ZERO1 = "--use-distributed-optimizer"
HYBRID = "--linear-decay gated-delta --softmax-every 2"
FIVE = ("--train-iters", "5")

ULYSSES = f"{TP2} {CP2} --sp-method ulysses"
LASP = f"{HYBRID} {CP2} {ZERO1} --sp-method lasp --sp-exchange allgather"
WORKER = Path(__file__).with_name("checkpoint_worker.py")


SIZE = "other SP size; other method"


def cells(methods: str, features: str) -> list[Any]:
    """The cells of every method with every feature."""
    return [
        pytest.mark.cell("megatron", method, f"checkpoint, {feature}")
        for method in methods.split()
        for feature in features.split("; ")
    ]


Saved = Callable[[int, str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The checkpoint of two steps of a run, by its ranks and arguments."""

    @cache
    def folder(ranks: int, arguments: str) -> Path:
        place = tmp_path_factory.mktemp("saved")
        argv = [*arguments.split(), "--train-iters", "2", "--checkpoint", str(place), "--save-every", "1"]
        train(place, ranks, *argv, timeout=300)
        assert [path.name for path in sorted(place.glob("step-*"))] == ["step-000001", "step-000002"]
        return place

    return folder


def resume(folder: Path, ranks: int, arguments: str) -> Run:
    """Goes on to five steps with Ulysses unless the arguments say else; on one context-parallel rank without plugin."""
    argv = [*arguments.split(), *FIVE, "--checkpoint", str(folder)]
    return train(folder, ranks, *argv, plugin="--context-parallel-size" in arguments, timeout=300)


def assert_same_losses(run: Run, reference: Run, tolerance: float = 1e-6) -> None:
    """All five, and the run has computed the last three of them itself."""
    assert len(run.losses) == len(reference.losses) == 5
    assert len(set(reference.losses)) == 5
    assert run.losses == pytest.approx(reference.losses, rel=tolerance)
    assert "step 3/5" in run.output
    assert "step 2/5" not in run.output


@pytest.mark.parametrize(
    ("before", "ranks", "after"),
    [
        pytest.param(
            f"{ULYSSES} {ZERO1}",
            4,
            f"{CP4} {ZERO1} --sp-method ring",
            id="cp4",
            marks=[*cells("ulysses ring", SIZE), EVERY],
        ),
        pytest.param(
            f"{ULYSSES} {ZERO1}",
            4,
            f"{CP2} {PP2} {ZERO1} --sp-method lightseq",
            id="pp2 x cp2",
            marks=[*cells("lightseq", "other method"), NEWEST],
        ),
        pytest.param(
            f"{ULYSSES} {ZERO1}",
            4,
            f"{CP4} {ZERO1} --sp-method usp --sp-ulysses-size 2 --sp-ring-size 2",
            id="cp4, usp",
            marks=[*cells("usp", SIZE), NEWEST],
        ),
        pytest.param(
            f"{CP4} {ZERO1} --sp-method lightseq",
            1,
            ZERO1,
            id="one rank",
            marks=[*cells("lightseq", SIZE), OLDEST],
        ),
        pytest.param(
            ULYSSES,
            4,
            f"{CP2} --sp-method usp",
            id="dp2 x cp2, whole optimizer",
            marks=[*cells("usp", "other method"), pytest.mark.matrix],
        ),
        pytest.param(
            LASP,
            4,
            f"{HYBRID} {CP4} {ZERO1} --sp-method lasp --sp-exchange ring",
            id="lasp: cp4",
            marks=[*cells("lasp", "other SP size"), OLDEST],
        ),
        pytest.param(
            LASP,
            4,
            f"{HYBRID} {CP2} {PP2} {ZERO1} --sp-method lasp",
            id="lasp: pp2 x cp2",
            marks=pytest.mark.matrix,
        ),
    ],
)
def test_goes_on_as_if_it_had_not_stopped(
    before: str, ranks: int, after: str, saved: Saved, reference: Callable[..., Run], tmp_path: Path
) -> None:
    folder = saved(2 if before == LASP else 4, before)
    shutil.copytree(folder, tmp_path / "checkpoint")
    run = resume(tmp_path / "checkpoint", ranks, after)
    assert_same_losses(run, reference(*model_arguments(after.split()), *FIVE))


OTHERS = {
    "ulysses": "--sp-method ulysses",
    "ring": "--sp-method ring",
    "usp": "--sp-method usp",
    "lightseq": "--sp-method lightseq",
    "lasp": f"{HYBRID} --sp-method lasp",
}


@NEWEST
@pytest.mark.parametrize("after", [TP2, PP2], ids=["tp2", "pp2"])
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=[*cells(method, "other TP, PP, DP"), *[pytest.mark.matrix] * (method != "ring")])
        for method in OTHERS
    ],
)
def test_replicas_become_tensor_or_pipeline_parallel_ranks(
    method: str, after: str, saved: Saved, reference: Callable[..., Run], tmp_path: Path
) -> None:
    arguments = f"{OTHERS[method]} {CP2} {ZERO1}"
    shutil.copytree(saved(4, arguments), tmp_path / "checkpoint")
    run = resume(tmp_path / "checkpoint", 4, f"{arguments} {after}")
    assert_same_losses(run, reference(*model_arguments(arguments.split()), *FIVE))


@pytest.mark.parametrize(
    ("ranks", "after"),
    [
        pytest.param(4, f"{TP2} {PP2}", id="tp2 x pp2, no method", marks=pytest.mark.matrix),
        pytest.param(2, f"{PP2} {VPP2}", id="interleaved", marks=pytest.mark.matrix),
        pytest.param(4, f"{PP2} {VPP2} {CP2} --sp-method ulysses", id="interleaved x cp2", marks=pytest.mark.matrix),
    ],
)
@pytest.mark.parametrize("optimizer", ["", ZERO1], ids=["whole optimizer", "distributed optimizer"])
def test_goes_on_at_other_sizes(
    ranks: int, after: str, optimizer: str, saved: Saved, reference: Callable[..., Run], tmp_path: Path
) -> None:
    folder = saved(4, f"{ULYSSES} {optimizer}".strip())
    shutil.copytree(folder, tmp_path / "checkpoint")
    run = resume(tmp_path / "checkpoint", ranks, f"{after} {optimizer}")
    assert_same_losses(run, reference(*FIVE))


@pytest.mark.matrix
@pytest.mark.parametrize("optimizer", ["", ZERO1], ids=["whole optimizer", "distributed optimizer"])
def test_bf16_goes_on_from_fp32_main_weights(optimizer: str, saved: Saved, tmp_path: Path) -> None:
    """Equal to the same run without a stop, which bf16 losses of other sizes are not."""
    before = f"{CP2} --bf16 --sp-method ring {optimizer}".strip()
    shutil.copytree(saved(2, before), tmp_path / "checkpoint")
    run = resume(tmp_path / "checkpoint", 2, before)
    assert run.losses == train(tmp_path / "whole", 2, *before.split(), *FIVE).losses


@OLDEST
def test_a_save_that_was_cut_off_is_not_the_last_one(
    saved: Saved, reference: Callable[..., Run], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(saved(4, f"{ULYSSES} {ZERO1}"), folder)
    whole, cut_off = folder / "step-000002", folder / ".step-000003"
    shutil.copytree(whole, cut_off)
    (cut_off / "metadata.json").unlink()
    record = json.loads((whole / "sequence_parallel.json").read_text())
    assert record["config"]["method"] == "ulysses"
    assert record["sizes"] == {"world": 4, "tp": 2, "pp": 1, "dp": 1, "sp": 2}
    assert record["optimizer"] == "fully_reshardable"
    argv = [*ZERO1.split(), *FIVE, "--checkpoint", str(folder), "--save-every", "1"]
    run = train(tmp_path, 1, *argv, plugin=False)
    assert_same_losses(run, reference(*FIVE))
    assert sorted(path.name for path in folder.glob("*step-*")) == [f"step-00000{step}" for step in range(1, 6)]


def test_loading_runs_no_code_and_refuses_what_cannot_be_loaded(tmp_path: Path) -> None:
    argv = [str(tmp_path), "--context-parallel-size", "2", "--sp-method", "ulysses"]
    worlds().run(2, WORKER, argv, 300)
