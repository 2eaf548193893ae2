"""Causal attention balanced and not: what the slowest rank takes."""

from __future__ import annotations

from pathlib import Path

from benchmarks import plots
from benchmarks.attention import HEAD_DIM, HEADS
from benchmarks.contenders import Contender, Shape, as_row, measure_contenders
from benchmarks.environment import cores
from benchmarks.progress import Advance
from benchmarks.result import Result
from dsp_plugin.spawn import RankFailure, spawn

NAME = "balance"
UNBALANCED = Contender("ring", "contiguous")
CONTENDERS = [
    UNBALANCED,
    Contender("ring", "zigzag"),
    Contender("ring", "striped"),
    Contender("lightseq", "contiguous"),
]
FULL = {8192: 3, 16384: 2}
QUICK = {2048: 2}
FULL_SIZES, QUICK_SIZES = (2, 3, 4), (2, 3)


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return len(QUICK_SIZES) * len(QUICK) if quick else len(FULL_SIZES) * len(FULL)


def run(quick: bool, advance: Advance) -> Result:
    """Measure at all lengths and sizes."""
    repeats, sizes = (QUICK, QUICK_SIZES) if quick else (FULL, FULL_SIZES)
    result = Result(
        NAME,
        "Balanced against unbalanced causal attention",
        {"shape": f"causal, B=1, H=K={HEADS}, D={HEAD_DIM}, fp32", "repeats by length": str(repeats)},
        {
            "length": "L",
            "size": "P",
            "contender": "method",
            "seconds": "s, slowest rank",
            "spread": "spread",
            "faster": "unbalanced / this",
            "cpu_busiest": "CPU s, busiest rank",
            "cpu_faster": "unbalanced / this, CPU",
            "balance": "mean / busiest CPU",
        },
        ["length", "size", "contender", "seconds", "faster", "cpu_faster"],
        notes=[
            "A step is forward and backward, medians of repeats in turns. In the contiguous layout the last rank has "
            "(2P-1)/P of the average work: balancing can win 1.5x at P=2, 1.67x at P=3 and 1.75x at P=4.",
            "LightSeq moves whole blocks: nobody idles at odd P, but at P=2 there is no block to give away, and at P=4 "
            "its busiest rank has 2.5 blocks where the average is 2.",
            f"Unbalanced is {UNBALANCED.name}. CPU seconds are the busiest rank's; they count what it computes, not "
            "what it waits. Mean / busiest is 1 where all ranks have the same to do.",
        ],
    )
    if cores() < max(sizes):
        result.notes.append(
            f"P > {cores()} on {cores()} cores: idle ranks leave their core to the busy ones, which hides imbalance "
            "from the clock. There, read the ratio of the busiest ranks' CPU."
        )
    for length, count in repeats.items():
        for size in sizes:
            advance(f"L={length} P={size}")
            try:
                _measure(result, Shape(length, HEADS, HEAD_DIM), size, count)
            except RankFailure as failure:
                result.failures.append(f"L={length} P={size}: {failure}")
    return result


def _measure(result: Result, shape: Shape, size: int, repeats: int) -> None:
    measured = spawn(measure_contenders, size, shape, CONTENDERS, repeats, False, timeout=300.0)[0]
    unbalanced = measured[UNBALANCED.name].samples
    for name, one in measured.items():
        row = {"length": shape.length, "size": size, **as_row(name, one)}
        row["faster"] = unbalanced.wall / one.samples.wall
        row["cpu_faster"] = max(unbalanced.cpu_by_rank) / max(one.samples.cpu_by_rank)
        result.rows.append(row)


def draw(result: Result, path: Path) -> None:
    """How many times faster than unbalanced, by the clock and by the busiest rank's CPU."""
    figure, panels = plots.panels(2, f"Causal, forward + backward: times faster than {UNBALANCED.name}")
    places = list(dict.fromkeys((row["size"], row["length"]) for row in sorted(result.rows, key=lambda r: r["size"])))
    for panel, key, title in zip(panels, ("faster", "cpu_faster"), ("by the clock", "by busiest CPU"), strict=True):
        found = {(row["contender"], row["size"], row["length"]): row[key] for row in result.rows}
        names = [contender.name for contender in CONTENDERS if contender != UNBALANCED]
        series = {name: [found[name, *place] for place in places] for name in names}
        labels = [f"P={size}\nL={length // 1024}K" for size, length in places]
        plots.bars(panel, labels, series, [plots.color(name) for name in names])
        panel.axhline(1, color="0.6", linewidth=1)
        panel.set_ylim(0, max(2.2, 1.2 * max(row[key] for row in result.rows)))
        panel.set_title(title)
    panels[0].legend(fontsize=8, loc="upper left")
    plots.save(figure, path)
