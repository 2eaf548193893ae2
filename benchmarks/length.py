"""The longest sequences that fit on GPUs of 80 GB by dry runs, beside what others publish."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.progress import Advance
from benchmarks.result import Result, Row

NAME = "length"
DEVICE_MEMORY = "76GiB"
"""What is left to tensors of the 80 GB (79.6 GiB) of a GPU, beside its driver's context and NCCL's buffers."""
HOST_MEMORY = "230GiB"
"""A rank's part of a node with 8 GPUs and 1.9 TB, as ALST's nodes have."""
PARTS = {"tile_tokens": 4096, "mlp_tiles": 16, "offload": True, "attention_rounds": 8}
GPUS = (1, 8, 32, 512)
# Heads of one key/value group are the most rounds that there are, and a rank has one at least.
HEADS = {"llama-8b": (32, 8), "qwen3-8b": (32, 8), "llama-70b": (64, 8)}
# Tokens, as published: ALST arXiv 2506.13996, UPipe arXiv 2602.21196, TRL's documentation of 1.13.
PUBLISHED = {
    ("llama-8b", 1): "ALST 500K",
    ("llama-8b", 8): "ALST 3.7M, UPipe 5M",
    ("llama-8b", 32): "ALST 15M",
    ("qwen3-8b", 8): "TRL 1M",
}


@dataclass(frozen=True)
class Case:
    """One row: a model on some GPUs, all of which share one sequence."""

    model: str
    gpus: int

    @property
    def memory(self) -> dict[str, Any]:
        """The section ``memory``: as many rounds as a rank has heads, at most."""
        ulysses = min(self.gpus, HEADS[self.model][0])
        return {**PARTS, "attention_rounds": min(PARTS["attention_rounds"], HEADS[self.model][0] // ulysses)}

    @property
    def command(self) -> list[str]:
        """Of `dsp-plugin`."""
        method = "ulysses" if self.gpus <= HEADS[self.model][0] else "usp"
        # On one GPU weights and gradients have to leave it, too, as they do in ALST's runs.
        offload = "all" if self.gpus == 1 else "optimizer"
        return [
            *("dry-run", "--model", f"hf:{self.model}", "--method", method, "--size", str(self.gpus)),
            *("--memory", json.dumps(self.memory), "--zero", "3", "--zero-offload", offload),
            *("--device-memory", DEVICE_MEMORY, "--host-memory", HOST_MEMORY, "--length", "max", "--json"),
        ]


CASES = [Case(model, gpus) for model in HEADS for gpus in GPUS]


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return len(_cases(quick))


def _cases(quick: bool) -> list[Case]:
    return [Case("llama-8b", 8)] if quick else CASES


def run(quick: bool, advance: Advance) -> Result:
    """One search for each case, in a process of its own."""
    result = Result(
        NAME,
        f"Longest sequences in {DEVICE_MEMORY} of a GPU, by dry runs",
        {"device memory": DEVICE_MEMORY, "host memory of a rank": HOST_MEMORY, "parts": str(PARTS)},
        {
            "model": "model",
            "gpus": "GPUs",
            "method": "method",
            "length": "longest, tokens",
            "published": "published",
            "kib_per_token": "KiB of activations per token of a rank",
            "device_gib": "GiB of the device",
            "host_gib": "GiB of the host",
            "largest": "holds the most at the peak",
            "seconds": "s of the search",
        },
        ["model", "gpus", "length", "published", "kib_per_token", "device_gib", "host_gib"],
        notes=[
            "One training step of one sequence in bf16, every layer recomputed, ZeRO 3 over all GPUs, the optimizer in "
            "host memory (on one GPU all model states); nothing is run on a GPU.",
            "Published lengths are measured, on nodes of 8 GPUs of 80 GB: ALST with 1.9 TB of host memory a node.",
            "0: model states alone do not fit.",
        ],
    )
    for case in _cases(quick):
        advance(f"{case.model} on {case.gpus}")
        _row(result, case)
    return result


def _row(result: Result, case: Case) -> None:
    started = time.monotonic()
    command = [sys.executable, "-W", "ignore", "-m", "dsp_plugin.cli.app", *case.command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        result.failures.append(f"{case.model} on {case.gpus}: {done.stderr.strip() or done.stdout.strip()}")
        return
    found = json.loads(done.stdout)
    need = next(each for each in found["needs"] if each["states"] == "ZeRO 3")
    holder, tokens = found["holders_of_the_peak_of_activations"][0], found["longest"]["length"]
    row: Row = {
        "model": case.model,
        "gpus": case.gpus,
        "method": found["method"],
        "length": tokens,
        "published": PUBLISHED.get((case.model, case.gpus), ""),
        "kib_per_token": need["activations"] * case.gpus / tokens / 2**10 if tokens else 0.0,
        "device_gib": need["total"] / 2**30,
        "host_gib": need["host"] / 2**30,
        "largest": f"{holder['module']} {holder['operator']}",
        "seconds": time.monotonic() - started,
        "command": " ".join(["dsp-plugin", *(f"'{word}'" if "{" in word else word for word in case.command)]),
        "holders": found["holders_of_the_peak_of_activations"],
        "need": need,
        "longest": found["longest"],
        "sent": found["runs"]["dry"]["bytes"],
    }
    result.rows.append(row)


def draw(result: Result, path: Path) -> None:
    """The longest over the GPUs."""
    figure, (panel,) = plots.panels(1, result.title)
    for model in HEADS:
        rows = [row for row in result.rows if row["model"] == model and row["length"]]
        panel.plot([row["gpus"] for row in rows], [row["length"] for row in rows], marker="o", label=model)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("GPUs")
    panel.set_ylabel("tokens")
    panel.legend(fontsize=8)
    plots.save(figure, path)
