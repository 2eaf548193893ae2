"""Loss curves of the linear language model: on one rank, and with its sequences sharded, under ZeRO 1, 2 and 3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.environment import ROOT
from benchmarks.progress import Advance
from benchmarks.result import Result

NAME = "convergence"
SIZE = 4
STAGES, QUICK_STAGES = (1, 2, 3), (1,)
STEPS, QUICK_STEPS = 200, 10
SHOWN = (1, 50, 100, 150, 200)
MODEL = {"width": 64, "heads": 4, "layers": 4, "decay": "gated-delta", "conv": 4, "softmax-every": 4}
LENGTH = 255
# Curves of one training drift apart by rounding, which every step adds to and the next amplifies.
LIMIT = 1e-4
_TIMEOUT = 600.0


class TrainingFailure(RuntimeError):  # noqa: N818
    """The script did not end well; the message has the end of what it wrote."""


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return 2 * len(QUICK_STAGES if quick else STAGES)


def run(quick: bool, advance: Advance) -> Result:
    """Train without and with the section, under every stage."""
    count = QUICK_STEPS if quick else STEPS
    at = [step for step in SHOWN if step <= count] + ([count] if count not in SHOWN else [])
    result = Result(
        NAME,
        "Convergence of the linear language model, sharded and unsharded",
        {
            "model": "LinearLM, " + ", ".join(f"{name} {value}" for name, value in MODEL.items()),
            "text": f"bytes of Python's standard library, {LENGTH} in a sample, 4 samples in a step",
            "script": "launch/examples/train_linear_deepspeed.py with "
            "configs/deepspeed/linear_lasp_zero{1,2,3}.json, fp32",
            "steps": count,
        },
        {
            "zero": "ZeRO",
            "ranks": "ranks",
            "sharded": "sequence",
            **{f"step {step}": f"loss at {step}" for step in at},
            "difference": "largest difference",
        },
        ["zero", "ranks", "sharded", *(f"step {step}" for step in at), "difference"],
        notes=[
            "Difference: the largest over all steps between the losses of the sharded and the unsharded run, absolute.",
            f"Sharded is method lasp on {SIZE} ranks, whose softmax layers, every fourth, lightseq serves. Unsharded "
            "is the same script and JSON without the section, on one rank. Both begin with the same weights and see "
            "the same samples; what differs is the order of fp32 sums.",
            "Mixers of LinearLM norm what states give, with an eps of 1e-2. At 1e-6 training amplifies rounding: "
            "runs whose first weights differ by 1e-7 of themselves, unsharded ones too, part by 1e-3 and more.",
        ],
    )
    whole: list[list[float]] = []
    for zero in QUICK_STAGES if quick else STAGES:
        curves: dict[int, list[float]] = {}
        for ranks in (1, SIZE):
            advance(f"ZeRO {zero}, {ranks} rank{'s' if ranks > 1 else ''}")
            try:
                curves[ranks] = train(zero, ranks, count)
            except TrainingFailure as failure:
                result.failures.append(f"ZeRO {zero}, {ranks} ranks: {failure}")
                continue
            result.rows.append(_row(zero, ranks, curves[ranks], at))
        whole += [curves[1]] if 1 in curves else []
        if len(curves) == 2:
            difference = largest_difference(curves[1], curves[SIZE])
            result.rows[-1]["difference"] = f"{difference:.1e}"
            if difference > LIMIT:
                result.failures.append(f"ZeRO {zero}: the curves differ by {difference:.1e}, more than {LIMIT}")
    control = max((largest_difference(whole[0], other) for other in whole[1:]), default=None)
    if control is not None:
        result.notes.append(f"Unsharded runs under different stages differ by up to {control:.1e}.")
    return result


def train(zero: int, ranks: int, count: int) -> list[float]:
    """The loss of every step, by the user's script on ``ranks`` ranks, each a process of one thread.

    Raises:
        TrainingFailure: a rank failed or hung.
    """
    config = json.loads((ROOT / "configs" / "deepspeed" / f"linear_lasp_zero{zero}.json").read_text())
    if ranks == 1:
        del config["sequence_parallel"]
    with tempfile.TemporaryDirectory() as folder:
        path, metrics = Path(folder) / "deepspeed.json", Path(folder) / "metrics.json"
        path.write_text(json.dumps(config))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        script = ["-m", "dsp_plugin.launch", str(ROOT / "launch" / "examples" / "train_linear_deepspeed.py")]
        sizes = [text for name, value in MODEL.items() for text in (f"--{name}", str(value))]
        data = ["--seq-length", str(LENGTH), "--steps", str(count)]
        files = ["--deepspeed_config", str(path), "--metrics-out", str(metrics)]
        # One machine's ranks, on CPU also where there is a GPU: fp32 sums are then in one order from run to run.
        environment = {
            **os.environ,
            **{"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": str(ranks), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        }
        _run([sys.executable, *launcher, *script, *files, *sizes, *data], environment, Path(folder))
        losses: list[float] = json.loads(metrics.read_text())["losses"]
    return losses


def _run(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
    """A command that starts ranks, none of which outlives it, however it ends."""
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
        try:
            code = process.wait(_TIMEOUT)
        except subprocess.TimeoutExpired as late:
            raise TrainingFailure(f"still running after {_TIMEOUT:g} s\n{log.read_text()[-3000:]}") from late
        finally:
            # Ranks are in sessions of their own, and end only when torchrun ends them.
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(40.0)
            process.kill()
    if code:
        raise TrainingFailure(f"exit code {code}\n{log.read_text()[-3000:]}")


def largest_difference(first: Sequence[float], second: Sequence[float]) -> float:
    """Over all steps, absolute."""
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def _row(zero: int, ranks: int, losses: list[float], at: Sequence[int]) -> dict[str, Any]:
    return {
        "zero": zero,
        "ranks": ranks,
        "sharded": "whole" if ranks == 1 else f"lasp, P={SIZE}",
        **{f"step {step}": f"{losses[step - 1]:.5f}" for step in at},
        "losses": losses,
    }


def draw(result: Result, path: Path) -> None:
    """The curves, and how far the sharded ones are from the unsharded."""
    figure, (curves, differences) = plots.panels(2, f"Linear language model, whole and sharded over {SIZE} ranks")
    stages = sorted({row["zero"] for row in result.rows})
    found = {(row["zero"], row["ranks"]): row["losses"] for row in result.rows}
    colors = dict(zip(stages, ("#4269d0", "#ff725c", "#6cc5b0"), strict=False))
    for zero in stages:
        whole, sharded = found[zero, 1], found[zero, SIZE]
        count = range(1, len(whole) + 1)
        curves.plot(count, whole, color=colors[zero], linewidth=3, alpha=0.35, label=f"ZeRO {zero}, whole")
        curves.plot(count, sharded, color=colors[zero], linewidth=1, linestyle="--", label=f"ZeRO {zero}, sharded")
        apart = [abs(a - b) for a, b in zip(whole, sharded, strict=True)]
        differences.plot(count, apart, color=colors[zero], linewidth=1, label=f"ZeRO {zero}")
    curves.set_title("loss")
    differences.set_title("difference, absolute")
    differences.set_yscale("log")
    for panel in (curves, differences):
        panel.set_xlabel("step")
        panel.legend(fontsize=8)
    plots.save(figure, path)
