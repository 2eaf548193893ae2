"""`megatron.training` saves and resumes by itself: with the plugin, also with other methods and sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cores import needs_training
from megatron_runs import EXAMPLES, ROOT, torchrun

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(900), needs_training()]
SCRIPT = str(EXAMPLES / "pretrain_gpt.py")
ARGUMENTS = [*(ROOT / "configs" / "megatron" / "gpt_tiny_cpu.args").read_text().split(), "--train-iters", "5"]
TORCH_DIST = ["--ckpt-format", "torch_dist"]
CP2 = "--context-parallel-size 2 --sp-method ulysses"
ZERO1, RESHARDABLE = "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"


def run(ranks: int, *argv: str) -> tuple[list[float], str]:
    """Losses of the iterations that were run, as Megatron prints them, and all it printed."""
    output = torchrun(ranks, "-m", "dsp_plugin.launch", "--cpu", SCRIPT, *ARGUMENTS, *argv, timeout=300).stdout
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", output)], output


@pytest.fixture(scope="module")
def stock() -> list[float]:
    """Five iterations of one rank."""
    losses, _ = run(1)
    assert losses[-1] < losses[0]
    return losses


def save(folder: Path, *argv: str) -> Path:
    """Two ranks that share every sequence; the checkpoint of their second iteration is what counts."""
    run(2, *CP2.split(), *argv, *TORCH_DIST, "--save", str(folder), "--save-interval", "2")
    record = json.loads((folder / "iter_0000002" / "sequence_parallel.json").read_text())
    assert record["sizes"]["sp"] == 2
    return folder


@pytest.mark.parametrize(
    ("optimizer", "ranks", "after"),
    [
        ("", 2, "--tensor-model-parallel-size 2"),
        (ZERO1, 4, "--context-parallel-size 4 --sp-method ring"),
        (f"{ZERO1} {RESHARDABLE}", 2, "--tensor-model-parallel-size 2"),
        (f"{ZERO1} {RESHARDABLE}", 4, "--context-parallel-size 4 --sp-method ring"),
    ],
    ids=["whole optimizer: tp2", "distributed: cp4", "reshardable: tp2", "reshardable: cp4"],
)
def test_resumes(optimizer: str, ranks: int, after: str, stock: list[float], tmp_path: Path) -> None:
    saved = save(tmp_path / "saved", *optimizer.split())
    resumed = ["--load", str(saved), "--ckpt-step", "2", *TORCH_DIST]
    losses, output = run(ranks, *after.split(), *optimizer.split(), *resumed)
    # The second line that a process prints is the mean of its first two iterations.
    assert losses == pytest.approx([stock[2], (stock[2] + stock[3]) / 2, stock[4]], rel=1e-6)
    if "sp-method" in after:
        assert "sequence_parallel.method ulysses -> ring" in output


def test_resumes_where_a_kill_left_the_last_iteration_unwritten(stock: list[float], tmp_path: Path) -> None:
    saved = save(tmp_path / "saved")
    (saved / "latest_checkpointed_iteration.txt").write_text("")
    (saved / "iter_0000005" / "metadata.json").unlink()
    losses, output = run(2, *CP2.split(), "--load", str(saved), *TORCH_DIST)
    assert "It is now 4, the last whole checkpoint" in output
    assert losses == pytest.approx(stock[4:], rel=1e-6)
