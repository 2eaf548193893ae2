"""Runs of real Megatron-core on CPU and gloo, on standing ranks or by torchrun, and when two are equal."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from standing_world import RunFailure, Worlds
from torch import Tensor

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "launch" / "examples"
CORE_SCRIPT = EXAMPLES / "pretrain_gpt_core.py"

TP2, PP2, CP2 = (f"--{axis}-parallel-size 2" for axis in ("tensor-model", "pipeline-model", "context"))
CP4 = "--context-parallel-size 4"
VPP2 = "--virtual-pipeline-model-parallel-size 2"

# Arguments that change the model or the loss, and how many values each takes.
MODEL_FLAGS = {
    "--num-query-groups": 1,
    "--mask-newlines": 0,
    "--calculate-per-token-loss": 0,
    "--window-size": 2,
    "--mtp-num-layers": 1,
    "--bf16": 0,
    "--untie-embeddings-and-output-weights": 0,
    "--linear-decay": 1,
    "--softmax-every": 1,
}


@dataclass(frozen=True)
class Run:
    """What a training run left behind."""

    losses: list[float]
    gradients: dict[str, Tensor]
    output: str


def torchrun(ranks: int, *argv: str, timeout: float = 150.0, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node ranks` in a process group of its own.

    Raises:
        AssertionError: it took longer than `timeout` seconds, with the stacks of all ranks; or with `check`, it failed.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("DSP_PLUGIN_")},
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *argv]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # Faulthandler prints a rank's stacks on SIGABRT; torchrun passes the ranks' output on.
        os.killpg(process.pid, signal.SIGABRT)
        try:
            output, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        raise AssertionError(f"{' '.join(command)} hung for {timeout:g} s:\n{output[-20000:]}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if check:
        assert process.returncode == 0, f"{' '.join(command)} failed:\n{output[-20000:]}"
    return subprocess.CompletedProcess(command, process.returncode, output, "")


@cache
def worlds() -> Worlds:
    """The worlds of this session."""
    return Worlds()


def train(
    folder: Path,
    ranks: int,
    *argv: str,
    plugin: bool = True,
    script: Path = CORE_SCRIPT,
    timeout: float = 150.0,
) -> Run:
    """Trains with the script, with Ulysses unless `argv` says else, or with stock Megatron.

    Raises:
        RunFailure: a rank failed, or did not end in `timeout` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metrics, gradients = folder / "metrics.json", folder / "gradients.pt"
    method = ["--sp-method", "ulysses"] if plugin and "--sp-method" not in argv else []
    out = ["--metrics-out", str(metrics), "--dump-grads", str(gradients)]
    printed = worlds().run(ranks, script, [*argv, *method, *out], timeout)
    return Run(json.loads(metrics.read_text())["losses"], torch.load(gradients), "".join(printed))


def model_arguments(argv: list[str]) -> list[str]:
    """The part of a command line that changes the model or the loss, and not how it is sharded."""
    kept: list[str] = []
    for place, argument in enumerate(argv):
        if argument in MODEL_FLAGS:
            kept += argv[place : place + 1 + MODEL_FLAGS[argument]]
    return kept


def assert_parity(run: Run, reference: Run) -> None:
    """The first loss within 1e-6, later ones and every first-step gradient within 1e-5, relative.

    Later losses are of weights that Adam moved, which divides small gradients by themselves and their rounding.
    """
    assert len(run.losses) == len(reference.losses) == 3
    assert reference.losses[-1] < reference.losses[0], "the reference does not learn, so equal losses would say little"
    for step, (ours, theirs) in enumerate(zip(run.losses, reference.losses, strict=True)):
        bound = 1e-5 if step else 1e-6
        assert abs(ours - theirs) <= bound * abs(theirs), f"step {step}: loss {ours} is not {theirs}"
    assert run.gradients.keys() == reference.gradients.keys()
    for name, theirs in reference.gradients.items():
        ours = run.gradients[name]
        assert ours.shape == theirs.shape, name
        assert theirs.norm() > 0, name
        error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
        assert error <= 1e-5, f"gradient of {name}: relative error {error:.2e}"


def assert_within_noise(run: Run, rounded: Run, exact: Run, *, most: float = 0.02) -> None:
    """A bf16 run moves losses no farther from those of one bf16 process than rounding moves these from fp32."""
    noise = farthest(exact, rounded)
    assert 0 < noise < most
    assert farthest(run, rounded) <= noise


def farthest(one: Run, other: Run) -> float:
    """How far apart two losses of a step are at the most."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def assert_refused(folder: Path, words: list[str], *argv: str, script: Path = CORE_SCRIPT) -> None:
    """Both of two ranks fail, and each says all of the words."""
    with pytest.raises(RunFailure) as failure:
        train(folder, 2, *argv, script=script)
    by_rank = str(failure.value).split("--- rank ")[1:]
    assert len(by_rank) == 2
    for said in by_rank:
        assert all(word in said for word in words), said
