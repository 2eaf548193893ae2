"""Where records of the step log go: the console, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.training.step_log import StepRecord

Writer = Callable[[StepRecord], None]


def console(record: StepRecord) -> None:
    """Prints one line."""
    print(line(record), flush=True)


def line(record: StepRecord) -> str:
    """A record in one line, for people."""
    loss = "" if record.loss is None else f"loss {record.loss:.6f} | "
    mfu = "" if record.mfu is None else f" (MFU {100 * record.mfu:.1f} %)"
    longest, waiter = record.waiting_most
    peak, holder = record.memory_most
    sent = ", ".join(f"{name} {in_units(size)}" for name, size in record.sent.items() if size) or "nothing"
    waits = f" | checkpoints on the host {in_units(record.on_host)}" if record.on_host else ""
    return (
        f"step {record.step} | {loss}{record.seconds:.3f} s | {record.tokens_per_second:,.0f} tokens/s | "
        f"{record.tflops:.3g} TFLOP/s a rank{mfu} | waited {record.waiting:.3f} s for communication "
        f"(rank {waiter}: {longest:.3f} s) | sent by a rank: {sent} | peak memory {in_units(peak)} (rank {holder})"
        f"{waits}"
    )


def scalars(record: StepRecord) -> dict[str, float]:
    """A record as named numbers, for plots."""
    longest, _ = record.waiting_most
    peak, _ = record.memory_most
    values = {
        "seconds": record.seconds,
        "tokens_per_second": record.tokens_per_second,
        "tflops_per_rank": record.tflops,
        "waiting_seconds_mean": record.waiting,
        "waiting_seconds_most": longest,
        "peak_memory_bytes_most": float(peak),
        **{f"sent_bytes/{name}": size for name, size in record.sent.items()},
        **{f"peak_memory_bytes/rank_{rank}": float(size) for rank, size in enumerate(record.memory)},
    }
    if record.on_host:
        values["host_checkpoint_bytes_most"] = float(record.on_host)
    if record.loss is not None:
        values["loss"] = record.loss
    if record.mfu is not None:
        values["mfu"] = record.mfu
    return {f"sequence_parallel/{name}": value for name, value in values.items()}


def tensorboard(folder: str) -> Writer:
    """Writes event files to a folder.

    Raises:
        SequenceParallelConfigError: TensorBoard is not installed, or cannot write there.
    """
    _need("tensorboard", "log_tensorboard", folder)
    try:
        # The writer itself finds out in a thread of its own, later. Of a URL it alone knows.
        if "://" not in folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
        summary: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder)
    except OSError as error:
        raise SequenceParallelConfigError(
            setting="log_tensorboard",
            value=folder,
            why=f"no event file can be written there: {error.strerror or error}",
            remedy="name a folder that every rank may write to, or drop the setting",
        ) from error

    def write(record: StepRecord) -> None:
        for name, value in scalars(record).items():
            summary.add_scalar(name, value, record.step)
        summary.flush()

    return write


def wandb(project: str) -> Writer:
    """Writes to the script's own W&B run, or to a new one of a project.

    Raises:
        SequenceParallelConfigError: wandb is not installed.
    """
    _need("wandb", "log_wandb", project)
    package: Any = importlib.import_module("wandb")

    def write(record: StepRecord) -> None:
        run = package.run or package.init(project=project)
        # Without a step of its own: the script's calls of wandb.log count theirs.
        run.log({**scalars(record), "sequence_parallel/step": record.step})

    return write


def writers(folder: str | None, project: str | None) -> list[Writer]:
    """The console, and what is asked for.

    Args:
        folder: for TensorBoard. project: for W&B.

    Raises:
        SequenceParallelConfigError: the package of one is not installed, or the folder cannot be written to.
    """
    found: list[Writer] = [console]
    if folder is not None:
        found.append(tensorboard(folder))
    if project is not None:
        found.append(wandb(project))
    return found


def in_units(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _need(package: str, setting: str, value: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise SequenceParallelConfigError(
            setting=setting,
            value=value,
            why=f"the package {package} is not installed",
            remedy=f"install it (pip install {package}) or drop the setting",
        )
