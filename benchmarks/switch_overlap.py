"""DSP switches that are started early and waited for late, beside work, over links of known bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import plots
from benchmarks.measure import Samples, in_turns
from benchmarks.netns import HostFailure, why_not
from benchmarks.netns_switch import switched
from benchmarks.progress import Advance
from benchmarks.result import Result
from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.comm.ledger import ledger
from dsp_plugin.layout import shard_sizes
from dsp_plugin.methods import dsp

NAME = "switch_overlap"
RATE = 200
FULL_SHAPE, FULL_REPEATS = (2, 16, 512, 256), 9
QUICK_SHAPE, QUICK_REPEATS = (2, 16, 128, 128), 2
POINTS = ((2, "sleep"), (2, "matmul"), (4, "sleep"))
"""Ranks, and what they do meanwhile. Matrices of four ranks would wait for two cores, not for the link."""
_WIDTH = 192


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return len(POINTS)


def run(quick: bool, advance: Advance) -> Result:
    """Measure at every number of ranks, if namespaces and shaping are permitted."""
    shape, repeats = (QUICK_SHAPE, QUICK_REPEATS) if quick else (FULL_SHAPE, FULL_REPEATS)
    result = Result(
        NAME,
        "A DSP switch in turn with other work and beside it",
        {
            "activation": f"[B, T, S, C] = {list(shape)}, fp32, {prod(shape) * 4 / 2**20:g} MiB over all ranks; T -> S",
            "link": f"a network namespace per rank on a bridge; veth, {RATE} Mbit/s by tc tbf both ways; gloo over TCP",
            "repeats": repeats,
        },
        {
            "size": "P",
            "kind": "work",
            "alone": "s, switch alone",
            "expected": "s by bandwidth",
            "work": "s, work alone",
            "in_turn": "s in turn",
            "beside": "s beside",
            "spread": "spread, in turn / beside",
            "faster": "in turn / beside",
            "hidden": "hidden",
            "sent_mib": "MiB sent, busiest rank",
        },
        ["size", "kind", "alone", "work", "in_turn", "beside", "faster", "hidden"],
        notes=[
            "A step is forward and backward, the slowest rank's, medians of repeats in turns. In turn: `dsp.switch`, "
            "then the work. Beside: `dsp.switch_start`, the work, `wait`; autograd runs the same three in reverse.",
            "The work needs nothing of the switch. sleep: each pass sleeps as long as the bandwidth allows the switch, "
            "as if an accelerator computed. matmul: as many matrices as take about that long in forward.",
            "Hidden: what beside saves over in turn, of the shorter of switch and work alone.",
            "By bandwidth: both directions of a link at a time. Between two ranks gloo now and then sends one after "
            "the other, which doubles a pass; samples show it.",
        ],
    )
    reason = why_not(shaped=True)
    if reason is not None:
        result.skipped = reason
        return result
    for size, kind in POINTS:
        advance(f"P={size}, {kind}")
        try:
            with switched(size) as hosts:
                hosts.shape(RATE)
                ranks = hosts.hosts.run(measure, shape, kind, repeats, timeout=120.0)
        except HostFailure as failure:
            result.failures.append(f"P={size}, {kind}: {failure}")
            continue
        result.rows.append(_row(size, kind, shape, ranks))
    return result


def _expected(shape: tuple[int, ...], size: int) -> float:
    """Seconds that the busiest rank's bytes of one pass take on its link."""
    sent = dsp.switch_bytes(shape, 1, 2, size=size, rank=0, element_size=4).forward
    return sent * 8 / (RATE * 1e6)


@dataclass(frozen=True)
class Point:
    """Steps by name, as one rank saw them, and the bytes that a switch sends in both passes."""

    samples: dict[str, Samples]
    sent: int


def measure(shape: tuple[int, ...], kind: str, repeats: int) -> Point:
    """On each rank: the switch alone, the work alone, both in turn and both at a time, in turns."""
    size = dist.get_world_size()
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method="dsp", size=size))
    mine = (shape[0], shard_sizes(shape[1], size)[groups.dsp.rank], *shape[2:])
    x = torch.randn(mine, generator=torch.Generator().manual_seed(groups.dsp.rank), requires_grad=True)
    work = _sleeps(_expected(shape, size)) if kind == "sleep" else _matrices(_expected(shape, size))

    def start() -> dsp.PendingSwitch:
        return dsp.switch_start(x, 1, 2, length=shape[1], groups=groups)

    def in_turn() -> list[Tensor]:
        return [start().wait(), work()]

    def beside() -> list[Tensor]:
        pending = start()
        worked = work()
        return [pending.wait(), worked]

    forwards = {"alone": lambda: [start().wait()], "work": lambda: [work()], "in_turn": in_turn, "beside": beside}
    with ledger() as log:
        passes = {name: _both_passes(forward) for name, forward in forwards.items()}
        for both_passes in passes.values():
            both_passes()
    return Point(in_turns(passes, repeats), log.bytes() // 3)


def _both_passes(forward: Callable[[], list[Tensor]]) -> Callable[[], None]:
    def both_passes() -> None:
        out = forward()
        torch.autograd.backward(out, [torch.ones_like(each) for each in out])

    return both_passes


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, None


def _sleeps(seconds: float) -> Callable[[], Tensor]:
    y = torch.ones(1, requires_grad=True)
    return lambda: _Sleep.apply(y, seconds)


def _matrices(seconds: float) -> Callable[[], Tensor]:
    y, weight = torch.randn(2, _WIDTH, _WIDTH) / _WIDTH**0.5
    weight.requires_grad_()

    def work(count: int) -> Tensor:
        h = y
        for _ in range(count):
            h = (h @ weight).tanh()
        return h

    trial = 20
    work(trial)
    start = time.perf_counter()
    work(trial)
    taken: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(taken, time.perf_counter() - start)
    count = max(1, round(seconds / max(taken) * trial))
    return lambda: work(count)


def _row(size: int, kind: str, shape: tuple[int, ...], ranks: list[Point]) -> dict[str, Any]:
    samples = ranks[0].samples
    alone, work, in_turn, beside = (samples[name] for name in ("alone", "work", "in_turn", "beside"))
    return {
        "size": size,
        "kind": kind,
        "alone": alone.wall,
        "expected": 2 * _expected(shape, size),
        "work": work.wall,
        "in_turn": in_turn.wall,
        "beside": beside.wall,
        "spread": f"{in_turn.spread} / {beside.spread}",
        "faster": in_turn.wall / beside.wall,
        "hidden": f"{(in_turn.wall - beside.wall) / min(alone.wall, work.wall):.0%}",
        "sent_mib": max(rank.sent for rank in ranks) / 2**20,
        "samples": {name: each.walls for name, each in samples.items()},
    }


def draw(result: Result, path: Path) -> None:
    """Seconds of both, in turn and beside each other, with the longer of the two alone."""
    figure, (seconds,) = plots.panels(1, f"DSP: a switch and other work, {RATE} Mbit/s")
    places = [f"P={row['size']}, {row['kind']}" for row in result.rows]
    series = {
        "in turn": [row["in_turn"] for row in result.rows],
        "beside": [row["beside"] for row in result.rows],
        "the longer alone": [max(row["alone"], row["work"]) for row in result.rows],
    }
    plots.bars(seconds, places, series, ["0.6", "#4269d0", "#97bbf5"])
    seconds.set_title("seconds, forward and backward")
    seconds.set_ylim(0, 1.35 * max(row["in_turn"] for row in result.rows))
    seconds.legend(fontsize=8)
    plots.save(figure, path)
