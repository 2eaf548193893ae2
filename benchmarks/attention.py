"""Forward and backward of every softmax method against the local kernel on the whole sequence."""

from __future__ import annotations

from pathlib import Path

from benchmarks import plots
from benchmarks.contenders import CEILING, LOCAL, Contender, Shape, as_row, measure_contenders
from benchmarks.environment import cores
from benchmarks.progress import Advance
from benchmarks.result import Result
from dsp_plugin.spawn import RankFailure, spawn

NAME = "attention"
HEADS, HEAD_DIM = 4, 64
FULL = {4096: 5, 8192: 3, 16384: 2, 32768: 1}
QUICK = {1024: 2, 2048: 2}
SIZES = (2, 4)


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return len(SIZES) * len(QUICK if quick else FULL)


def run(quick: bool, advance: Advance) -> Result:
    """Measure at all lengths and sizes."""
    repeats = QUICK if quick else FULL
    result = Result(
        NAME,
        "Attention, forward and backward, against one thread on the whole sequence",
        {"shape": f"causal, B=1, H=K={HEADS}, D={HEAD_DIM}, fp32", "repeats by length": str(repeats)},
        {
            "length": "L",
            "size": "P",
            "contender": "method",
            "seconds": "s",
            "spread": "spread",
            "speedup": "speed-up",
            "of_ideal": f"of min(P, {cores()} cores)",
            "of_ceiling": "of ceiling",
            "cpu_busiest": "CPU s, busiest rank",
            "sent_mib": "MiB sent per rank",
        },
        ["length", "size", "contender", "seconds", "speedup", "of_ceiling"],
        notes=[
            f"Speed-up: seconds of the {LOCAL} with one thread over those of the slowest rank, medians of repeats in "
            "turns, in the same processes.",
            f"The {CEILING} is every rank running the local kernel on the whole sequence with its share of the heads, "
            "nothing sent: what the cores give when all are busy. It is not a method.",
        ],
    )
    if cores() < max(SIZES):
        result.notes.append(
            f"P={max(SIZES)} runs on {cores()} cores: {max(SIZES)} single-threaded ranks share them, so the ideal "
            f"speed-up is {cores()}, not {max(SIZES)}. What each rank computes is in its CPU seconds."
        )
    for length, count in repeats.items():
        for size in SIZES:
            advance(f"L={length} P={size}")
            try:
                _measure(result, Shape(length, HEADS, HEAD_DIM), size, count)
            except RankFailure as failure:
                result.failures.append(f"L={length} P={size}: {failure}")
    return result


def contenders(size: int) -> list[Contender]:
    """USP needs a grid with more than one rank both ways."""
    methods = [Contender("ulysses", "contiguous"), Contender("ring", "zigzag")]
    if size >= 4:
        methods.append(Contender("usp", "zigzag"))
    return [*methods, Contender("lightseq", "contiguous")]


def _measure(result: Result, shape: Shape, size: int, repeats: int) -> None:
    ranks = spawn(measure_contenders, size, shape, contenders(size), repeats, True, timeout=300.0)
    measured = ranks[0]
    local, ceiling = measured[LOCAL].samples.wall, measured[CEILING].samples.wall
    for name, one in measured.items():
        row = {"length": shape.length, "size": 1 if name == LOCAL else size, **as_row(name, one)}
        if name == LOCAL:
            row["contender"] = f"{LOCAL}, beside P={size}"
        row["speedup"] = local / one.samples.wall
        if name != LOCAL:
            row["of_ideal"] = row["speedup"] / min(size, cores())
            row["of_ceiling"] = ceiling / one.samples.wall
        result.rows.append(row)


def draw(result: Result, path: Path) -> None:
    """Speed-up over length, one panel per P."""
    figure, panels = plots.panels(len(SIZES), "Forward + backward, causal: speed-up over one thread")
    for panel, size in zip(panels, SIZES, strict=True):
        rows = [row for row in result.rows if row["size"] == size]
        for name in dict.fromkeys(row["contender"] for row in rows):
            mine = [row for row in rows if row["contender"] == name]
            plots.line(panel, name, [row["length"] for row in mine], [row["speedup"] for row in mine])
        ideal = min(size, cores())
        panel.axhline(ideal, color="0.6", linewidth=1, linestyle=":", label=f"ideal on {cores()} cores")
        panel.axhline(1, color="0.85", linewidth=1)
        panel.set_title(f"P = {size}" + (f" on {cores()} cores" if size > cores() else ""))
        panel.set_ylim(0, 1.15 * max(ideal, *(row["speedup"] for row in rows)))
        plots.lengths(panel, sorted({row["length"] for row in rows}))
    panels[0].set_ylabel("speed-up")
    panels[-1].legend(fontsize=8, loc="lower right")
    plots.save(figure, path)
