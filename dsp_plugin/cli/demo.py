"""The main job on one machine: DeepSpeed with DSP, Megatron-core with TP x PP x Ulysses, each beside its unsharded run.

Every job is a user's script in its own processes, started as a user would start it. This file only compares what they
wrote down.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.methods import METHODS, WireBytes, Workload
from dsp_plugin.planner.moves import Activation, Border
from dsp_plugin.planner.stages import StagePlan, StageSpec, plan_stages

FIRST_STEPS, FIRST_TOLERANCE, CURVE_TOLERANCE = 3, 1e-6, 1e-3


@dataclass(frozen=True)
class Video:
    """Shapes of the video job: T and S that two ranks cannot share evenly."""

    steps: int
    sequence_ranks: int = 2
    batch: int = 8
    frames: int = 7
    canvas: int = 20
    patch: int = 4
    width: int = 96
    depth: int = 3
    sampled: int = 10
    sample_steps: int = 25

    @property
    def patches(self) -> int:
        """S: patches in a frame."""
        return (self.canvas // self.patch) ** 2

    @property
    def token_bytes(self) -> int:
        """Of one patch of one channel, in fp32."""
        return 4 * self.patch**2

    def flags(self) -> list[str]:
        """As the script takes them."""
        names = ("steps", "frames", "canvas", "patch", "width", "depth")
        shape = [part for name in names for part in (f"--{name}", str(getattr(self, name)))]
        return [*shape, "--sample-steps", str(self.sample_steps)]

    def forward_passes(self) -> int:
        """Videos that went forward: trained on, and sampled with and without the caption."""
        return self.steps * self.batch + 2 * self.sampled * self.sample_steps


@dataclass(frozen=True)
class Text:
    """Shapes of the GPT job: tensor, pipeline and sequence parallel over 2 x 2 x 2 ranks."""

    steps: int
    tensor: int = 2
    pipeline: int = 2
    sequence: int = 2
    layers: int = 4
    hidden: int = 64
    heads: int = 8
    groups: int = 4
    length: int = 256
    global_batch: int = 4

    def flags(self) -> list[str]:
        """As the script takes them."""
        return _flags(
            num_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            num_query_groups=self.groups,
            seq_length=self.length,
            global_batch_size=self.global_batch,
            train_iters=self.steps,
        )

    def parallel_flags(self) -> list[str]:
        """What the sharded run adds."""
        return _flags(
            tensor_model_parallel_size=self.tensor,
            pipeline_model_parallel_size=self.pipeline,
            context_parallel_size=self.sequence,
            sp_method="ulysses",
        )

    def per_call(self) -> WireBytes:
        """Bytes leaving a rank in one layer for one micro-batch of one sequence."""
        workload = Workload(
            size=self.sequence,
            heads=self.heads // self.tensor,
            kv_heads=self.groups // self.tensor,
            length=self.length,
            head_dim=self.hidden // self.heads,
            layout="zigzag",
        )
        return METHODS["ulysses"].wire_bytes(workload, 0)


def _flags(**values: Any) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def run(output: Path, video: Video, text: Text, console: Console) -> bool:
    """Run the four jobs, compare, and write plots, logs and TensorBoard files to ``output``.

    Returns:
        Whether every sharded run equals its unsharded one, in losses and in bytes.

    Raises:
        UnsupportedError: a package that the demo needs is not installed.
    """
    _require("deepspeed", "megatron.core", "matplotlib", "sklearn", "tensorboard")
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    _run_jobs(output, video, text, console)
    ok = _report_video(output, video, console)
    ok = _report_text(output, text, console) and ok
    plot = _plot(output)
    console.print(f"loss curves       {plot}")
    console.print(f"generated frames  {output / 'video' / 'samples.png'}")
    console.print(f"TensorBoard       tensorboard --logdir {output}")
    console.print(f"{'All equal' if ok else 'NOT EQUAL'}, {time.perf_counter() - started:.0f} s.")
    return ok


def _require(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name.partition(".")[0]) is None]
    if missing:
        raise UnsupportedError(
            setting="demo",
            why=f"not installed: {', '.join(missing)}",
            remedy="pip install 'dsp-plugin[deepspeed,megatron,demo]', or run `make demo` in a clone",
        )


def _run_jobs(output: Path, video: Video, text: Text, console: Console) -> None:
    examples, configs = (Path(str(files(f"dsp_plugin.{name}"))) for name in ("launch.examples", "configs"))
    ds_config = configs / "deepspeed" / "video_dsp_zero2.json"
    video_script = [str(examples / "train_video_deepspeed.py"), "--deepspeed_config", str(ds_config), *video.flags()]
    text_script = [str(examples / "pretrain_gpt_core.py"), *text.flags()]
    for part in ("video", "gpt"):
        (output / part).mkdir(exist_ok=True)

    def records(part: str, run: str) -> list[str]:
        return ["--metrics-out", str(output / part / f"{run}.json"), "--tensorboard", str(output / part / run)]

    on_cpu = {"DS_ACCELERATOR": "cpu"} if not _has_cuda() else {}
    launcher = ["-m", "dsp_plugin.launch", "--report"]
    cpu_flag = [] if _has_cuda() else ["--cpu"]
    jobs = [
        ("video DiT, DeepSpeed ZeRO-2, 1 rank", 1, [*video_script, *records("video", "unsharded")], on_cpu),
        (
            f"video DiT, DeepSpeed ZeRO-2, DSP on {video.sequence_ranks} ranks",
            video.sequence_ranks,
            [
                *(*launcher, str(output / "video" / "report")),
                *(*video_script, *records("video", "sharded")),
                *("--samples-out", str(output / "video" / "samples.png")),
            ],
            on_cpu,
        ),
        (
            "GPT, Megatron-core, 1 rank",
            1,
            ["-m", "dsp_plugin.launch", *cpu_flag, *text_script, *records("gpt", "unsharded")],
            {},
        ),
        (
            f"GPT, Megatron-core, TP{text.tensor} x PP{text.pipeline} x Ulysses {text.sequence}",
            text.tensor * text.pipeline * text.sequence,
            [
                *(*launcher, str(output / "gpt" / "report"), *cpu_flag),
                *(*text_script, *records("gpt", "sharded"), *text.parallel_flags()),
            ],
            {},
        ),
    ]
    for index, (title, ranks, command, environment) in enumerate(jobs, 1):
        log = output / f"job-{index}.log"
        started = time.perf_counter()
        label = f"[{index}/{len(jobs)}] {title}"
        if console.is_terminal:
            with console.status(label):
                _torchrun(ranks, command, environment, log)
        else:
            _torchrun(ranks, command, environment, log)
        console.print(f"{label}: {time.perf_counter() - started:.0f} s", markup=False)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _torchrun(ranks: int, command: list[str], environment: dict[str, str], log: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    # LOCAL_SIZE is what DeepSpeed's CPU accelerator counts as devices.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(ranks), **environment}
    with open(log, "w") as file:
        done = subprocess.run([*torchrun, *command], env=env, stdout=file, stderr=subprocess.STDOUT, timeout=900)
    if done.returncode:
        tail = "\n".join(log.read_text().splitlines()[-30:])
        raise RuntimeError(f"the job failed, see {log}:\n{tail}")


def _report_video(output: Path, video: Video, console: Console) -> bool:
    folder = output / "video"
    ok = _compare_losses("video DiT", folder, console)
    plan = _video_plan(video)

    console.print("  DSP: bytes leaving the busiest rank for one video, by the formula", soft_wrap=True)
    table = Table()
    for column in ("layer", "space stage", "time stage", "forward", "backward"):
        table.add_column(column, justify="left" if "stage" in column else "right")
    for layer in range(video.depth):
        space, in_time = plan.rows[1 + 2 * layer], plan.rows[2 + 2 * layer]
        table.add_row(
            str(layer),
            space.move,
            in_time.move,
            f"{space.wire.forward + in_time.wire.forward:,}",
            f"{space.wire.backward + in_time.wire.backward:,}",
        )
    console.print(table)
    # Uneven shards make each rank's own figure depend on which it is, so what is compared is the sum over the ranks.
    per_video = _traffic(plan, video)
    times = {"forward": video.forward_passes(), "backward": video.steps * video.batch}
    console.print("  all ranks, one video:", soft_wrap=True)
    table = _comparison()
    for (what, collective, phase), formula in per_video.items():
        sent = _sent(folder, method="dsp", phase=phase, collective=collective)
        ok = _compare_bytes(table, f"{what}, {phase}", sent, formula, times[phase]) and ok
    console.print(table)
    _resources(folder, console)
    return ok


def _video_plan(video: Video) -> StagePlan:
    """For one video: tokens are split as pixels, and gathered as pixels after the last stage."""
    activation = Activation({"b": 1, "t": video.frames, "s": video.patches}, video.width, element_size=4)
    blocks = [StageSpec("space", ("s",)), StageSpec("time", ("t",))] * video.depth
    stages = [StageSpec("embed", ()), *blocks, StageSpec("final", ())]
    enter, leave = Border(video.token_bytes, backward=False), Border(video.token_bytes)
    return plan_stages(activation, stages, video.sequence_ranks, enter=enter, leave=leave)


def _traffic(plan: StagePlan, video: Video) -> dict[tuple[str, str, str], int]:
    """Bytes that all ranks send for one video, by what sends them, the ledger's name for it, and phase."""
    gathered = video.frames * video.patches * video.token_bytes * (video.sequence_ranks - 1)
    moves = sum(row.move.startswith("switch") for row in plan.rows)
    switches, rest = divmod(plan.total - gathered, 2)
    assert rest == 0, "a switch sends alike both ways, summed over ranks"
    return {
        (f"{moves} switches", "all_to_all", "forward"): switches,
        (f"{moves} switches", "all_to_all", "backward"): switches,
        ("gather at the end", "all_gather", "forward"): gathered,
        ("split at the start", "all_gather", "backward"): 0,
    }


def _report_text(output: Path, text: Text, console: Console) -> bool:
    folder = output / "gpt"
    ok = _compare_losses("GPT", folder, console)
    console.print("  one layer, one micro-batch, one rank:", soft_wrap=True)
    ranks = text.tensor * text.pipeline * text.sequence
    calls = text.layers // text.pipeline * text.global_batch * text.steps * ranks
    table = _comparison()
    for phase, formula in text.per_call()._asdict().items():
        sent = _sent(folder, method="ulysses", phase=phase)
        ok = _compare_bytes(table, f"ulysses, {phase}", sent, formula, calls) and ok
    console.print(table)
    _resources(folder, console)
    return ok


def _comparison() -> Table:
    table = Table()
    for column in ("bytes", "formula", "ledger", "equal"):
        table.add_column(column, justify="left" if column == "bytes" else "right")
    return table


def _compare_bytes(table: Table, what: str, sent: int, formula: int, times: int) -> bool:
    """Adds a row that compares a formula with what the ledger counted over the whole run, ``times`` as much."""
    equal = sent == formula * times
    table.add_row(
        what, f"{formula:,}", f"{sent / times:,.0f}" if equal else f"{sent / times:,.3f}", "yes" if equal else "NO"
    )
    return equal


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _losses(folder: Path, run: str) -> list[float]:
    metrics = _read(folder / f"{run}.json")
    losses: list[float] = metrics["losses"]
    return losses


def _ranks(folder: Path) -> list[dict[str, Any]]:
    return [_read(path) for path in sorted((folder / "report").glob("rank-*.json"))]


def _sent(folder: Path, **names: str) -> int:
    """Bytes in the ledgers of all ranks, of the rows with these names."""
    rows = [row for rank in _ranks(folder) for row in rank["ledger"]]
    return sum(row["bytes"] for row in rows if all(row[key] == value for key, value in names.items()))


def _compare_losses(name: str, folder: Path, console: Console) -> bool:
    pairs = list(zip(_losses(folder, "unsharded"), _losses(folder, "sharded"), strict=True))
    differences = [abs(sharded - whole) / abs(whole) for whole, sharded in pairs]
    first, worst = max(differences[:FIRST_STEPS]), max(differences)
    ok = first <= FIRST_TOLERANCE and worst <= CURVE_TOLERANCE
    verdict = "equal" if ok else "NOT EQUAL"
    console.print(
        f"\n{name}: losses of sharded and unsharded runs are {verdict}: largest relative difference {first:.1e} in the "
        f"first {FIRST_STEPS} steps, {worst:.1e} in all {len(pairs)}; loss {pairs[0][1]:.4f} -> {pairs[-1][1]:.4f}",
        markup=False,
        soft_wrap=True,
    )
    return ok


def _resources(folder: Path, console: Console) -> None:
    for run in ("unsharded", "sharded"):
        rate = _read(folder / f"{run}.json")["tokens_per_second"]
        console.print(f"  {run}: {rate:,.0f} tokens/s", soft_wrap=True)
    peaks = ", ".join(f"{rank['peak_rss_bytes'] / 2**20:.0f}" for rank in _ranks(folder))
    console.print(f"  peak memory of the sharded run's processes, MiB by rank: {peaks}", soft_wrap=True)


def _plot(output: Path) -> Path:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    titles = {"video": "video DiT, DeepSpeed ZeRO-2, DSP", "gpt": "GPT, Megatron-core, TP x PP x Ulysses"}
    for axis, (part, title) in zip(axes, titles.items(), strict=True):
        axis.plot(_losses(output / part, "unsharded"), label="unsharded", linewidth=3, alpha=0.4)
        axis.plot(_losses(output / part, "sharded"), label="sharded", linewidth=1)
        axis.set(title=title, xlabel="optimizer step", ylabel="loss")
        axis.legend()
    path = output / "losses.png"
    figure.savefig(path, dpi=120)
    return path
