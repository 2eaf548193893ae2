"""Transfers in flight while blocks compute, and not, over a link of known bandwidth."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import plots
from benchmarks.attention import HEAD_DIM, HEADS
from benchmarks.contenders import Contender, Shape, prepared
from benchmarks.measure import Samples, timed
from benchmarks.netns import HostFailure, hosts, sent_bytes, why_not
from benchmarks.progress import Advance
from benchmarks.result import Result
from dsp_plugin.comm.ledger import ledger
from dsp_plugin.comm.wire import Sender, Transfers
from dsp_plugin.methods import lightseq, ring

NAME = "overlap"
CONTENDERS = [Contender("ring", "zigzag"), Contender("ring", "contiguous"), Contender("lightseq", "contiguous")]
FULL_LENGTH, FULL_RATES, FULL_REPEATS = 8192, (200, 400, 800), 3
QUICK_LENGTH, QUICK_RATES, QUICK_REPEATS = 2048, (400,), 2


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return len(QUICK_RATES if quick else FULL_RATES)


def run(quick: bool, advance: Advance) -> Result:
    """Measure at all rates, if namespaces and shaping are permitted."""
    length, rates, repeats = (
        (QUICK_LENGTH, QUICK_RATES, QUICK_REPEATS) if quick else (FULL_LENGTH, FULL_RATES, FULL_REPEATS)
    )
    result = Result(
        NAME,
        "Overlap on against off, between two network namespaces",
        {
            "shape": f"causal, B=1, L={length}, H=K={HEADS}, D={HEAD_DIM}, fp32, P=2, one rank per namespace",
            "link": "veth, shaped by tc tbf on both ends, gloo over TCP",
            "repeats": repeats,
        },
        {
            "rate": "Mbit/s, set",
            "rate_measured": "measured",
            "contender": "method",
            "on": "s, overlap on",
            "off": "s, off",
            "spread": "spread, on / off",
            "faster": "off / on",
            "ledger_mib": "MiB by ledger, both ranks",
            "wire_mib": "MiB on the wire",
            "overhead": "wire / ledger",
        },
        ["rate", "contender", "on", "off", "faster", "overhead"],
        notes=[
            "A step is forward and backward, the slowest rank's, medians of repeats in turns. Off: every transfer is "
            "waited for as soon as it is posted, before the block that it would hide behind.",
            "Measured rate: payload of one 4 MiB transfer over its time. The wire's bytes come from the interface "
            "counters of both namespaces: TCP/IP headers, acknowledgements and the barrier that starts a step are in.",
            "At P=2 the first of two blocks hides one transfer; the gradients' way home has nothing left to hide "
            "behind. LightSeq has nothing to balance at P=2: only rank 1 has a second block.",
        ],
    )
    reason = why_not(shaped=True)
    if reason is not None:
        result.skipped = reason
        return result
    with hosts() as pair:
        for rate in rates:
            advance(f"{rate} Mbit/s")
            try:
                pair.shape(rate)
                ranks = pair.run(measure, Shape(length, HEADS, HEAD_DIM), repeats, timeout=150.0)
            except HostFailure as failure:
                result.failures.append(f"{rate} Mbit/s: {failure}")
                continue
            _rows(result, rate, ranks)
    return result


@dataclass
class Counted:
    """Bytes that left one rank in each repeat: ``ledger`` as the library counts, ``wire`` as the interface does."""

    ledger: list[int]
    wire: list[int]


def measure(shape: Shape, repeats: int) -> dict[str, Any]:
    """On each of two ranks: every contender with overlap and without, in turns.

    Returns:
        ``samples`` and ``counted`` by contender and whether overlap was on, and ``rate`` in Mbit/s.
    """
    steps = {contender: prepared(contender, shape) for contender in CONTENDERS}
    samples: dict[tuple[str, bool], list[Any]] = {}
    counted: dict[tuple[str, bool], Counted] = {}
    for _ in range(repeats):
        for contender, step in steps.items():
            for overlap in (True, False):
                key = contender.name, overlap
                count = counted.setdefault(key, Counted([], []))
                before = sent_bytes()
                with ledger() as log, ExitStack() as stack:
                    if not overlap:
                        stack.enter_context(no_overlap())
                    samples.setdefault(key, []).append(timed(step))
                # Until the other rank has all, too.
                dist.barrier()
                count.ledger.append(log.bytes())
                count.wire.append(sent_bytes() - before)
    return {"samples": {key: Samples(taken) for key, taken in samples.items()}, "counted": counted, "rate": _rate()}


class _Awaited(Transfers):
    """Transfers that are over when they are posted."""

    def __init__(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, int], like: Tensor, collective: str, sender: Sender
    ) -> None:
        super().__init__(sends, receives, like, collective, sender)
        self._arrived = super().wait()

    def wait(self) -> dict[int, Tensor]:
        return self._arrived


@contextmanager
def no_overlap() -> Iterator[None]:
    """Ring and LightSeq wait for every transfer before they compute."""
    with mock.patch.object(ring, "Transfers", _Awaited), mock.patch.object(lightseq, "Transfers", _Awaited):
        yield


def _rate() -> float:
    """Mbit/s of one transfer from rank 0 to rank 1, as rank 1 sees it from a common start."""
    payload = torch.zeros(4 * 2**20, dtype=torch.uint8)
    dist.barrier()
    start = time.perf_counter()
    if dist.get_rank() == 0:
        dist.send(payload, 1)
    else:
        dist.recv(payload, 0)
    return payload.numel() * 8 / 1e6 / (time.perf_counter() - start)


def _rows(result: Result, rate: int, ranks: list[dict[str, Any]]) -> None:
    for contender in CONTENDERS:
        on, off = (ranks[0]["samples"][contender.name, overlap] for overlap in (True, False))
        counts = [rank["counted"][contender.name, True] for rank in ranks]
        by_ledger, on_wire = (
            sum(median(getattr(count, which)) for count in counts) / 2**20 for which in ("ledger", "wire")
        )
        result.rows.append(
            {
                "rate": rate,
                "rate_measured": ranks[1]["rate"],
                "contender": contender.name,
                "on": on.wall,
                "off": off.wall,
                "spread": f"{on.spread} / {off.spread}",
                "faster": off.wall / on.wall,
                "ledger_mib": by_ledger,
                "wire_mib": on_wire,
                "overhead": on_wire / by_ledger,
                "samples_on": on.walls,
                "samples_off": off.walls,
                "counted": [asdict(count) for count in counts],
            }
        )


def draw(result: Result, path: Path) -> None:
    """How many times longer a step takes without overlap, and the times themselves."""
    figure, (ratios, seconds) = plots.panels(2, "Two network namespaces: overlap of transfers and compute")
    rates = sorted({row["rate"] for row in result.rows})
    labels = [f"{rate} Mbit/s" for rate in rates]
    found = {(row["contender"], row["rate"]): row for row in result.rows}
    names = [contender.name for contender in CONTENDERS]
    series = {name: [found[name, rate]["faster"] for rate in rates] for name in names}
    plots.bars(ratios, labels, series, [plots.color(name) for name in names])
    ratios.axhline(1, color="0.6", linewidth=1)
    ratios.set_title("time without overlap / with")
    ratios.legend(fontsize=8, loc="upper left")
    ratios.set_ylim(0, max(2.0, 1.2 * max(row["faster"] for row in result.rows)))
    both = {f"{names[0]}, {which}": [found[names[0], rate][which] for rate in rates] for which in ("on", "off")}
    plots.bars(seconds, labels, both, [plots.color(names[0]), "0.6"])
    seconds.set_title("seconds per step")
    seconds.legend(fontsize=8)
    plots.save(figure, path)
