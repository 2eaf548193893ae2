"""What a new batch of packed documents costs the host once: its layout, its mask and the schedule of a ring."""

from __future__ import annotations

import time
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import plots
from benchmarks.progress import Advance
from benchmarks.result import Result
from dsp_plugin.layout import Layout
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods.ring import schedule_of
from dsp_plugin.methods.ring_schedule import RingSchedule

NAME = "packed_schedule"
SIZE, RANK, TOKENS_EACH = 8, 3, 256
FULL, QUICK = (128, 512, 2048), (128, 512)
FULL_REPEATS, QUICK_REPEATS = 15, 3
PARTS = ("layout", "mask", "schedule")

Borders = tuple[int, ...]


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return len(QUICK if quick else FULL)


def run(quick: bool, advance: Advance) -> Result:
    """Measure at all numbers of documents."""
    repeats = QUICK_REPEATS if quick else FULL_REPEATS
    result = Result(
        NAME,
        "The host's share of a new packed batch",
        {
            "shape": f"documents of log-normal lengths, {TOKENS_EACH} tokens on average, causal; rank {RANK} of "
            f"P={SIZE} on a ring",
            "repeats": repeats,
        },
        {
            "documents": "documents",
            "length": "L",
            **{part: f"ms, {part}" for part in PARTS},
            "total": "ms, all",
            "again": "us, another layer",
            "over": "pairs, most / mean",
            "sent": "tokens sent / cut",
            "calls": "runs / cut",
        },
        ["documents", "length", *PARTS, "total", "again"],
        notes=[
            "CPU time of the host, medians of new batches, of whose borders nothing is known before; all of "
            "the schedule that a rank uses forward and backward. Another layer asks for that of the same batch again.",
            "Tokens sent and runs of all ranks are in parts of those where every document is cut in 2P runs.",
        ],
    )
    for documents in QUICK if quick else FULL:
        advance(f"{documents} documents")
        result.rows.append(_measured(documents, repeats))
    return result


def _measured(documents: int, repeats: int) -> dict[str, float]:
    spent: dict[str, list[float]] = {name: [] for name in (*PARTS, "again")}
    for seed in range(repeats + 1):
        borders = _borders(documents, seed)
        ticks = [time.thread_time()]
        layout = Layout.of_documents("zigzag", borders[-1], SIZE, borders)
        for rank in range(SIZE):
            layout.runs(rank)
        ticks.append(time.thread_time())
        mask = MaskSpec(causal=True, cu_seqlens=borders)
        ticks.append(time.thread_time())
        for _ in range(2):
            _used(schedule_of(layout, mask))
            ticks.append(time.thread_time())
        if seed:  # The first use of a module costs more.
            for name, (start, stop) in zip(spent, pairwise(ticks), strict=True):
                spent[name].append(stop - start)
    return {
        "documents": documents,
        "length": borders[-1],
        **{part: 1e3 * median(spent[part]) for part in PARTS},
        "total": 1e3 * median(map(sum, zip(*(spent[part] for part in PARTS), strict=True))),
        "again": 1e6 * median(spent["again"]),
        **_compared(layout, mask),
    }


def _used(schedule: RingSchedule) -> None:
    """Have all of it worked out that a forward and a backward pass of the rank take."""
    for hop in schedule.hops(RANK):
        for _ in (hop.tokens, hop.calls, hop.on, hop.done, hop.jumps, hop.passed, hop.jumped, hop.returned):
            pass


def _compared(layout: Layout, mask: MaskSpec) -> dict[str, float]:
    """With the layout that cuts every document."""
    cut = Layout("zigzag", layout.length, layout.size, documents=layout.documents)
    sent, runs = {}, {}
    for way in (layout, cut):
        schedule = schedule_of(way, mask)
        sent[way] = sum(schedule.key_tokens_sent(rank) for rank in range(SIZE))
        runs[way] = sum(len(way.runs(rank).starts) for rank in range(SIZE))
    pairs = [_pairs(layout, rank) for rank in range(SIZE)]
    return {
        "over": max(pairs) * SIZE / sum(pairs),
        "sent": sent[layout] / sent[cut],
        "calls": runs[layout] / runs[cut],
    }


def _pairs(layout: Layout, rank: int) -> int:
    """How many keys the queries of a rank see."""
    starts = np.array(layout.documents)
    positions = layout.runs(rank).positions()
    return int((positions - starts[np.searchsorted(starts, positions, side="right") - 1] + 1).sum())


def _borders(documents: int, seed: int) -> Borders:
    lengths = np.random.default_rng(seed).lognormal(0.0, 1.0, documents)
    whole = np.maximum(1, (lengths * TOKENS_EACH * documents / lengths.sum()).astype(np.int64))
    whole[whole.argmax()] += TOKENS_EACH * documents - whole.sum()
    return (0, *accumulate(whole.tolist()))


def draw(result: Result, path: Path) -> None:
    """Milliseconds by the number of documents."""
    figure, panels = plots.panels(1, f"Host time of a new packed batch, P={SIZE}")
    labels = [f"{row['documents']} documents\nL={row['length'] // 1024}K" for row in result.rows]
    series = {part: [row[part] for row in result.rows] for part in (*PARTS, "total")}
    plots.bars(panels[0], labels, series, [plots.color(name) for name in ("ulysses", "ring zigzag", "usp", "")])
    panels[0].set_title("ms, median")
    panels[0].legend(fontsize=8, loc="upper left")
    plots.save(figure, path)
