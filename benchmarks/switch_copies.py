"""What a DSP switch copies, and takes, where the link is no limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import plots
from benchmarks.copies import WrittenBytes
from benchmarks.measure import Samples, in_turns
from benchmarks.netns import HostFailure, why_not
from benchmarks.netns_switch import switched
from benchmarks.progress import Advance
from benchmarks.result import Result
from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.comm import Route, all_to_all
from dsp_plugin.layout import shard_sizes
from dsp_plugin.methods import dsp

NAME = "switch_copies"
_CHANNELS = 256
FULL_REPEATS, QUICK_REPEATS = 15, 2


@dataclass(frozen=True)
class Case:
    """One switch of an activation of ``shape``."""

    name: str
    shape: tuple[int, ...]
    from_dim: int
    to_dim: int


def _cases(tokens: int) -> list[Case]:
    return [
        Case("B=1, T -> S", (1, 16, tokens // 16, _CHANNELS), 1, 2),
        Case("B=1, S -> T", (1, 16, tokens // 16, _CHANNELS), 2, 1),
        Case("B=4, T -> S", (4, 16, tokens // 64, _CHANNELS), 1, 2),
        Case("B=4, S -> T", (4, 16, tokens // 64, _CHANNELS), 2, 1),
        Case("3-D, D -> H", (1, 16, 16, tokens // 256, _CHANNELS), 1, 2),
        Case("3-D, H -> W", (1, 16, 16, tokens // 256, _CHANNELS), 2, 3),
    ]


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return 1


def run(quick: bool, advance: Advance) -> Result:
    """Measure between two namespaces, if they are permitted."""
    tokens, repeats = (4096, QUICK_REPEATS) if quick else (16384, FULL_REPEATS)
    result = Result(
        NAME,
        "Copies of a DSP switch",
        {
            "shape": f"{tokens} tokens of {_CHANNELS} channels, fp32, {tokens * _CHANNELS * 4 / 2**20:g} MiB over P=2; "
            "[B, T, S, C] or [B, D, H, W, C]",
            "link": "a network namespace per rank on a bridge; veth, not shaped; gloo over TCP",
            "repeats": repeats,
        },
        {
            "case": "switch",
            "copies": "copies each way",
            "copies_before": "copies by all_to_all",
            "ns": "ns a byte",
            "ns_before": "ns a byte by all_to_all",
            "spread": "spread, switch / all_to_all",
            "cpu_ns": "CPU ns a byte",
            "cpu_ns_before": "CPU ns a byte by all_to_all",
        },
        ["case", "copies", "copies_before", "ns", "ns_before"],
        notes=[
            "Copies: bytes that tensor operations write beside the exchange, of the shard's, forward / backward. "
            "all_to_all is the general exchange, which Ulysses uses too and switches used before: it packs what does "
            "not lie in order, and unpacks.",
            "A step is forward and backward, the slowest rank's, medians of repeats in turns, over twice the bytes of "
            "the shard. CPU: of all threads of a rank, mean over ranks, gloo's work included.",
        ],
    )
    reason = why_not(shaped=False)
    if reason is not None:
        result.skipped = reason
        return result
    advance("P=2")
    try:
        with switched(2) as hosts:
            ranks = hosts.hosts.run(measure, _cases(tokens), repeats, timeout=150.0)
    except HostFailure as failure:
        result.failures.append(str(failure))
        return result
    result.rows.extend(_row(case, ranks[0][case.name]) for case in _cases(tokens))
    return result


@dataclass(frozen=True)
class Point:
    """A step by way of moving, and the bytes that it wrote forward and backward over those of the shard."""

    samples: dict[str, Samples]
    copies: dict[str, tuple[float, float]]


def measure(cases: list[Case], repeats: int) -> dict[str, Point]:
    """On each of two ranks: every case by `dsp.switch` and by `all_to_all`, in turns."""
    size = dist.get_world_size()
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method="dsp", size=size))
    points = {}
    for case in cases:
        mine = list(case.shape)
        mine[case.from_dim] = shard_sizes(case.shape[case.from_dim], size)[groups.dsp.rank]
        x = torch.randn(mine, generator=torch.Generator().manual_seed(groups.dsp.rank), requires_grad=True)
        ways = {"switch": partial(_switch, x, case, groups), "all_to_all": partial(_exchange, x, case, groups)}
        grad = torch.ones_like(_switch(x, case, groups), memory_format=torch.contiguous_format)
        copies = {name: _copies(way, x, grad) for name, way in ways.items()}
        points[case.name] = Point(in_turns({name: _step(way, x, grad) for name, way in ways.items()}, repeats), copies)
    return points


def _switch(x: Tensor, case: Case, groups: SequenceParallelGroups) -> Tensor:
    return dsp.switch(x, case.from_dim, case.to_dim, length=case.shape[case.from_dim], groups=groups)


def _exchange(x: Tensor, case: Case, groups: SequenceParallelGroups) -> Tensor:
    lengths = case.shape[case.to_dim], case.shape[case.from_dim]
    route = Route.even(case.to_dim, case.from_dim, *lengths, groups.dsp.size)
    return all_to_all((x,), (route,), axis=groups.dsp, method="dsp")[0]


def _step(way: Callable[[], Tensor], x: Tensor, grad: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(way(), x, grad)


def _copies(way: Callable[[], Tensor], x: Tensor, grad: Tensor) -> tuple[float, float]:
    with WrittenBytes() as forward:
        out = way()
    with WrittenBytes() as backward:
        torch.autograd.grad(out, x, grad)
    return forward.written / x.nbytes, backward.written / x.nbytes


def _row(case: Case, point: Point) -> dict[str, Any]:
    shard = prod(case.shape) * 4 // 2
    row: dict[str, Any] = {"case": case.name, "shape": case.shape}
    for suffix, way in (("", "switch"), ("_before", "all_to_all")):
        samples = point.samples[way]
        cpu = sum(samples.cpu_by_rank) / len(samples.cpu_by_rank)
        row |= {
            f"copies{suffix}": " / ".join(f"{copies:g}" for copies in point.copies[way]),
            f"ns{suffix}": samples.wall / (2 * shard) * 1e9,
            f"cpu_ns{suffix}": cpu / (2 * shard) * 1e9,
            f"samples{suffix}": samples.walls,
        }
    return row | {"spread": " / ".join(point.samples[way].spread for way in ("switch", "all_to_all"))}


def draw(result: Result, path: Path) -> None:
    """Nanoseconds a byte by case, both ways."""
    figure, (time_panel, cpu_panel) = plots.panels(2, "DSP: one switch forward and backward, P=2, link not shaped")
    places = [row["case"].replace(", ", "\n") for row in result.rows]
    for panel, key, title in ((time_panel, "ns", "ns a byte"), (cpu_panel, "cpu_ns", "CPU ns a byte")):
        series = {
            "all_to_all": [row[f"{key}_before"] for row in result.rows],
            "switch": [row[key] for row in result.rows],
        }
        plots.bars(panel, places, series, ["0.6", "#4269d0"])
        panel.set_title(title)
        panel.tick_params(axis="x", labelsize=7)
        panel.set_ylim(0, 1.3 * max(map(max, series.values())))
        panel.legend(fontsize=8)
    plots.save(figure, path)
