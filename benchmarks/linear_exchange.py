"""The three exchanges of states against the number of ranks, over links of known bandwidth."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import plots
from benchmarks.measure import Samples, in_turns
from benchmarks.netns import HostFailure, why_not
from benchmarks.netns_switch import switched
from benchmarks.progress import Advance
from benchmarks.result import Result
from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.ledger import ledger
from dsp_plugin.kernels.linear import StateExchange
from dsp_plugin.methods.state_exchange import EXCHANGES, scan_blocks, state_exchange

NAME = "linear_exchange"
RATE = 200
FULL_SIZES, FULL_SHAPE, FULL_REPEATS = (2, 4, 8), (1, 16, 128, 128), 3
QUICK_SIZES, QUICK_SHAPE, QUICK_REPEATS = (2, 4), (1, 4, 128, 128), 2


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return 2 * len(QUICK_SIZES if quick else FULL_SIZES)


def run(quick: bool, advance: Advance) -> Result:
    """Measure at every number of ranks, on a shaped and on a free link, if namespaces and shaping are permitted."""
    sizes, shape, repeats = (
        (QUICK_SIZES, QUICK_SHAPE, QUICK_REPEATS) if quick else (FULL_SIZES, FULL_SHAPE, FULL_REPEATS)
    )
    megabytes = _bytes(shape) / 2**20
    result = Result(
        NAME,
        "LASP's exchanges of states against the number of ranks",
        {
            "state": f"[B, H, K, V] = {list(shape)}, fp32, X = {megabytes:g} MiB on every rank, no decay",
            "link": "a network namespace per rank on a bridge; veth, shaped by tc tbf both ways; gloo over TCP",
            "repeats": repeats,
        },
        {
            "size": "P",
            "rate": "Mbit/s",
            "exchange": "exchange",
            "alone": "s",
            "spread": "spread",
            "expected": "s by bandwidth",
            "of_expected": "s / by bandwidth",
            "work": "s of work",
            "beside_work": "s beside work",
            "hidden": "hidden",
            "sent_mib": "MiB sent, busiest rank",
        },
        ["size", "rate", "exchange", "alone", "expected", "beside_work", "hidden", "sent_mib"],
        notes=[
            "A step is one exchange forward and one backward, the slowest rank's, medians of repeats in turns.",
            "By bandwidth, both passes: 2 X over the rate, times P - 1 for ring (hops in turn) and allgather (every "
            "link carries P - 1 states), times (P - 2 + blocks) / blocks for scan.",
            "Beside work: every rank sleeps between posting and waiting, in each pass as long as allgather should "
            "take, as if an accelerator computed. Hidden: the part of the shorter of exchange and work that the step "
            "saves over doing one after the other.",
            "A chain forwards what arrived when its ranks are done with their work: beside work it hides no more than "
            "its first hop, where allgather is under way all the time. What allgather takes beyond the bandwidth is "
            "gloo's.",
        ],
    )
    reason = why_not(shaped=True)
    if reason is not None:
        result.skipped = reason
        return result
    for size in sizes:
        with switched(size) as switch:
            for rate in (RATE, None):
                advance(f"P={size}, {_name(rate)}")
                try:
                    switch.shape(rate)
                    work = (size - 1) * _bytes(shape) / _bytes_per_second(RATE)
                    ranks = switch.hosts.run(measure, shape, repeats, work, timeout=100.0)
                except HostFailure as failure:
                    result.failures.append(f"P={size}, {_name(rate)}: {failure}")
                    continue
                _rows(result, shape, rate, 2 * work, ranks)
    return result


def _name(rate: int | None) -> str:
    return "not shaped" if rate is None else f"{rate} Mbit/s"


def _bytes_per_second(megabits: int) -> float:
    return megabits * 1e6 / 8


def _bytes(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * 4


@dataclass(frozen=True)
class Point:
    """One exchange on one rank: a step by itself, a step beside work, and the bytes that a step sends."""

    alone: Samples
    beside_work: Samples
    sent: int


def measure(shape: tuple[int, ...], repeats: int, work: float) -> dict[str, Point]:
    """On each rank: every exchange with work and without, in turns, after a warm-up that also checks.

    Args:
        work: seconds in each pass.
    """
    group = dist.group.WORLD
    assert group is not None
    axis = Axis.of_group("lasp", group)
    passing = (False,) * axis.size
    exchanges = {name: state_exchange(name, axis, passing, known=None, nothing_decays=True) for name in EXCHANGES}
    state = torch.full(shape, float(axis.rank + 1))
    sent = {}
    for name, exchange in exchanges.items():
        with ledger() as log:
            _check(name, axis, _both_passes(exchange, state, 0.0))
        sent[name] = log.bytes()
    turns: dict[str, Callable[[], object]] = {}
    for name, exchange in exchanges.items():
        turns[f"{name} alone"] = partial(_both_passes, exchange, state, 0.0)
        turns[f"{name} beside work"] = partial(_both_passes, exchange, state, work)
    samples = in_turns(turns, repeats)
    return {name: Point(samples[f"{name} alone"], samples[f"{name} beside work"], sent[name]) for name in exchanges}


def _both_passes(exchange: StateExchange, state: Tensor, work: float) -> list[Tensor | None]:
    """What enters this rank's stretch, forward and backward."""
    entering = []
    for pass_ in (exchange.forward, partial(exchange.backward, kept=None)):
        arriving = pass_(None, state)
        time.sleep(work)
        entering.append(arriving.wait())
    return entering


def _check(name: str, axis: Axis, entering: list[Tensor | None]) -> None:
    """A fast wrong answer is no result. Rank r holds r + 1 everywhere, and nothing decays."""
    before, after = range(1, axis.rank + 1), range(axis.rank + 2, axis.size + 1)
    for got, ranks in zip(entering, (before, after), strict=True):
        assert (got is None) == (not ranks), name
        assert got is None or bool((got == float(sum(ranks))).all()), name


def _expected(exchange: str, shape: tuple[int, ...], size: int, rate: int) -> float:
    hop = 2 * _bytes(shape) / _bytes_per_second(rate)
    if exchange == "scan":
        blocks = scan_blocks(_bytes(shape), shape[-1], size)
        return (size - 2 + blocks) / blocks * hop
    return (size - 1) * hop


def _rows(result: Result, shape: tuple[int, ...], rate: int | None, work: float, ranks: list[dict[str, Point]]) -> None:
    size = len(ranks)
    for exchange in EXCHANGES:
        point = ranks[0][exchange]
        alone, beside = point.alone.wall, point.beside_work.wall
        expected = None if rate is None else _expected(exchange, shape, size, rate)
        result.rows.append(
            {
                "size": size,
                "rate": _name(rate),
                "exchange": exchange,
                "alone": alone,
                "spread": point.alone.spread,
                "expected": expected,
                "of_expected": None if expected is None else alone / expected,
                "work": work,
                "beside_work": beside,
                # Without a rate there is next to nothing to hide.
                "hidden": None if rate is None else f"{(alone + work - beside) / min(alone, work):.0%}",
                "sent_mib": max(rank[exchange].sent for rank in ranks) / 2**20,
                "sent_by_rank": [rank[exchange].sent for rank in ranks],
                "samples_alone": point.alone.walls,
                "samples_beside_work": point.beside_work.walls,
            }
        )


def draw(result: Result, path: Path) -> None:
    """Seconds over the number of ranks: alone with what the bandwidth allows, beside work, and on the free link."""
    figure, panels = plots.panels(3, "LASP: one exchange of states forward and one backward")
    colors = dict(zip(EXCHANGES, ("#ff725c", "#4269d0", "#6cc5b0"), strict=True))
    parts = [("alone", _name(RATE)), ("beside_work", _name(RATE)), ("alone", _name(None))]
    titles = [f"{_name(RATE)} (dotted: by bandwidth)", f"{_name(RATE)}, beside work", "not shaped"]
    for panel, (key, rate), title in zip(panels, parts, titles, strict=True):
        rows = [row for row in result.rows if row["rate"] == rate]
        sizes = sorted({row["size"] for row in rows})
        for exchange in EXCHANGES:
            mine = [row for row in rows if row["exchange"] == exchange]
            panel.plot(sizes, [row[key] for row in mine], marker="o", color=colors[exchange], label=exchange)
            if panel is panels[0]:
                panel.plot(sizes, [row["expected"] for row in mine], linestyle=":", color=colors[exchange])
        if key == "beside_work":
            work = [median(row["work"] for row in rows if row["size"] == size) for size in sizes]
            panel.plot(sizes, work, linestyle="--", color="0.6", label="the work itself")
        panel.set_title(title)
        panel.set_xticks(sizes, [f"P={size}" for size in sizes])
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("seconds")
    plots.save(figure, path)
