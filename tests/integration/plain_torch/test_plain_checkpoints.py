"""The example stops and goes on with other ranks, another method and another wrapper, as if it had not stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rooms import ROOT

from dsp_plugin.launch.examples import train_fsdp
from dsp_plugin.spawn import spawn

SMALL = [
    *("--width", "16", "--seq-length", "19", "--samples", "10"),
    *("--global-batch-size", "4", "--micro-batch-size", "1"),
]
TOLERANCE = 1e-5


def _train(runs: list[list[str]]) -> list[tuple[list[float], float]]:
    return [train_fsdp.train(train_fsdp.parse_arguments([*SMALL, *run]), torch.device("cpu")) for run in runs]


@pytest.mark.timeout(300)
def test_a_stopped_run_goes_on_with_other_sizes(tmp_path: Path) -> None:
    """Of ten samples, so that an epoch ends in a step: from FSDP2 on two ranks to DDP on four, and back."""
    folder, steps = str(tmp_path / "saved"), 6
    whole, _ = spawn(
        _train,
        2,
        [
            ["--ddp", "--method", "ulysses", "--size", "1", "--steps", str(steps)],
            ["--fsdp", "--method", "ring", "--size", "2", "--steps", "2", "--checkpoint", folder],
        ],
        timeout=140,
    )[0]
    first, second = spawn(
        _train,
        4,
        [
            ["--ddp", "--method", "usp", "--size", "4", "--steps", "4", "--checkpoint", folder],
            ["--fsdp", "--method", "ulysses", "--size", "2", "--steps", str(steps), "--checkpoint", folder],
        ],
        timeout=140,
    )[0]
    assert first[0] == pytest.approx(whole[0][:4], rel=TOLERANCE)
    assert second[0] == pytest.approx(whole[0], rel=TOLERANCE)
    assert second[1] == pytest.approx(whole[1], rel=TOLERANCE)
    assert whole[0][-1] < whole[0][0]


@pytest.mark.matrix
@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", [["--fsdp", "--method", "ring", "--size", "2"], ["--ddp", "--section"]])
def test_the_script_runs_from_the_command_line(how: list[str], tmp_path: Path) -> None:
    out = tmp_path / "metrics.json"
    if how[-1] == "--section":
        how = [*how, str(ROOT / "configs" / "torch" / "hf_usp.json")]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone"]
    script = str(ROOT / "launch" / "examples" / "train_fsdp.py")
    given = [*SMALL, *how, "--steps", "3", "--metrics-out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, script, *given], capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("dsp_plugin 0") == 1
    assert len(json.loads(out.read_text())["losses"]) == 3
