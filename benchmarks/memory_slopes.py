"""Peak memory of a small language model against length, with what is traded for it on and off: real and dry."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import plots
from benchmarks.progress import Advance
from benchmarks.result import Result, Row
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.rehearsal.dryrun import Job, RankRun, dry_run, real_run
from dsp_plugin.rehearsal.subject import subject
from dsp_plugin.spawn import RankFailure

NAME = "memory_slopes"
SIZE = 2
SHAPE = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}
ALL: dict[str, Any] = {"tile_tokens": 64, "mlp_tiles": 8, "attention_rounds": 2, "offload": True}
# Behind tiled logits, which else hide what the other parts save.
PARTS: dict[str, dict[str, Any]] = {
    "off": {},
    "tile_tokens": {"tile_tokens": 64},
    **{f"tile_tokens, {name}": {"tile_tokens": 64, name: value} for name, value in list(ALL.items())[1:]},
    "all": ALL,
}
FULL, QUICK = (4096, 8192, 12288), (4096,)


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return len(_plan(quick))


def _plan(quick: bool) -> list[tuple[str, int]]:
    parts = ("off", "all") if quick else tuple(PARTS)
    return [(name, length) for name in parts for length in (QUICK if quick else FULL)]


def run(quick: bool, advance: Advance) -> Result:
    """A real step on spawned ranks and a dry one, for each part and length."""
    result = Result(
        NAME,
        "Peak memory against length, with what is traded for it on and off",
        {"model": str(SHAPE), "ranks": f"P={SIZE}, Ulysses, fp32, every layer recomputed", "all": str(ALL)},
        {
            "part": "memory",
            "length": "L",
            "real_mib": "MiB at the peak, by the allocator",
            "dry_mib": "MiB by the dry run",
            "ratio": "real / dry",
            "slope": "KiB per token of a rank, from the length before",
            "host_mib": "MiB of the host",
            "sent_mib": "MiB sent per rank",
        },
        ["part", "length", "real_mib", "dry_mib", "ratio", "slope", "host_mib"],
        notes=[
            "The peak is of activations and gradients, without parameters and inputs, of the rank that needs the most.",
            "Real: what the CPU's allocator tells torch's profiler, without the buffers that stand for host memory.",
        ],
    )
    with TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(SHAPE))
        for name, length in _plan(quick):
            advance(f"{name}, L={length}")
            sharded = SequenceParallelConfig(method="ulysses", size=SIZE, memory=PARTS[name])
            job = Job(partial(subject, f"hf:{config}", {"length": length}), sharded)
            try:
                real = real_run(job, 600.0)
            except RankFailure as failure:
                result.failures.append(f"{name}, L={length}: {failure}")
                continue
            _row(result, name, length, real, [dry_run(job, SIZE, rank) for rank in range(SIZE)])
    return result


def _row(result: Result, name: str, length: int, real: list[RankRun], dry: list[RankRun]) -> None:
    peaks = [max(run.memory.peak for run in runs) for runs in (real, dry)]
    row: Row = {
        "part": name,
        "length": length,
        "real_mib": peaks[0] / 2**20,
        "dry_mib": peaks[1] / 2**20,
        "ratio": peaks[0] / peaks[1],
        "host_mib": max(run.memory.host for run in real) / 2**20,
        "sent_mib": max(run.nbytes for run in real) / 2**20,
        "memory": [[run.memory._asdict() for run in runs] for runs in (real, dry)],
    }
    if [run.rows for run in real] != [run.rows for run in dry]:
        result.failures.append(f"{name}, L={length}: real and dry run send other bytes")
    before = [earlier for earlier in result.rows if earlier["part"] == name]
    if before:
        more = (row["real_mib"] - before[-1]["real_mib"]) * 2**10
        row["slope"] = more / ((length - before[-1]["length"]) / SIZE)
    result.rows.append(row)


def draw(result: Result, path: Path) -> None:
    """Lines that should be straight: allocator's marks on the dry run's lines."""
    figure, (panel,) = plots.panels(1, f"Peak of a step, P={SIZE}, MiB")
    for name in PARTS:
        rows = [row for row in result.rows if row["part"] == name]
        x, real, dry = ([row[key] for row in rows] for key in ("length", "real_mib", "dry_mib"))
        (line,) = panel.plot(x, dry, label=name)
        panel.plot(x, real, marker="o", markersize=4, linestyle="", color=line.get_color())
    panel.set_yscale("log")
    panel.set_xlabel("sequence length; lines are dry runs, marks are real")
    panel.legend(fontsize=7)
    plots.save(figure, path)
