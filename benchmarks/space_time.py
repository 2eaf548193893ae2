"""One space-time transformer under DSP, Ulysses, ring attention and Megatron's TP-SP, over links of known bandwidth."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch.distributed as dist
from torch import Tensor

from benchmarks import plots
from benchmarks.environment import cores
from benchmarks.measure import Samples, Spent, timed
from benchmarks.netns import HostFailure, sent_bytes, why_not
from benchmarks.netns_switch import switched
from benchmarks.progress import Advance
from benchmarks.result import Result, Row
from benchmarks.space_time_bytes import sent_bytes_by_formula
from benchmarks.space_time_models import Contender, Planned, Sizes, TensorParallel
from dsp_plugin.comm.ledger import ledger

NAME = "space_time"
LOCAL = "one rank"
PLANNED = ("dsp", "ulysses", "ring")
TP_SP = ("tp-sp",)
CONTENDERS = PLANNED + TP_SP
TOLERANCE = 1e-4
FULL_SIZES = Sizes(frames=16, side=64, width=64, heads=4, depth=4)
QUICK_SIZES = Sizes(frames=8, side=32, width=32, heads=4, depth=2)
FULL_RANKS, FULL_RATES, FULL_REPEATS = (2, 4), (200, 1000), 5
QUICK_RANKS, QUICK_RATES, QUICK_REPEATS = (2,), (200,), 2


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return len(QUICK_RANKS) * len(QUICK_RATES) if quick else len(FULL_RANKS) * len(FULL_RATES)


def run(quick: bool, advance: Advance) -> Result:
    """Measure at every number of ranks and rate, if namespaces and shaping are permitted."""
    sizes = QUICK_SIZES if quick else FULL_SIZES
    repeats = QUICK_REPEATS if quick else FULL_REPEATS
    result = Result(
        NAME,
        "DSP against Ulysses, ring and Megatron's TP-SP on one space-time model",
        {
            "model": f"VideoDiT, depth {sizes.depth} (a space and a time block each: self-attention, cross-attention, "
            f"MLP), width {sizes.width}, heads {sizes.heads}, fp32",
            "batch": f"B={sizes.batch}, T={sizes.frames}, S={sizes.patches}, {sizes.caption} condition tokens",
            "link": "a network namespace per rank on a bridge; veth, shaped by tc tbf both ways; gloo over TCP",
            "repeats": repeats,
        },
        {
            "ranks": "P",
            "rate": "Mbit/s",
            "contender": "method",
            "seconds": "s per step",
            "spread": "spread",
            "ratio": "s / dsp's",
            "cpu": "CPU s, all ranks",
            "cpu_share": "of the step",
            "by_bandwidth": "s by bandwidth",
            "ledger_mib": "MiB a rank sends, ledger",
            "formula_mib": "by formula",
            "wire_mib": "on the wire",
            "overhead": "wire / formula",
            "bytes_ratio": "formula / dsp's",
            "reduction": "s, gradients",
            "reduction_mib": "MiB, gradients, on the wire",
            "whole_ratio": "s with gradients / dsp's",
        },
        ["ranks", "rate", "contender", "seconds", "ratio", "cpu_share", "ledger_mib", "formula_mib", "wire_mib"],
        notes=_notes(),
    )
    result.skipped = _obstacle() or ""
    if result.skipped:
        return result
    for ranks in QUICK_RANKS if quick else FULL_RANKS:
        with switched(ranks) as switch:
            for rate in QUICK_RATES if quick else FULL_RATES:
                advance(f"P={ranks}, {rate} Mbit/s")
                try:
                    switch.shape(rate)
                    points = switch.hosts.run(measure, sizes, repeats, timeout=200.0)
                except HostFailure as failure:
                    result.failures.append(f"P={ranks}, {rate} Mbit/s: {failure}")
                    continue
                _rows(result, sizes, rate, points)
    result.notes += _verdict(result)
    return result


def _obstacle() -> str | None:
    if importlib.util.find_spec("megatron") is None:
        return "megatron-core is not installed."
    return why_not(shaped=True)


def _notes() -> list[str]:
    return [
        "A step is forward and backward, the slowest rank's, medians of repeats in turns. All contenders start from "
        f"the same weights and see the same videos; losses and every gradient agree within {TOLERANCE:g} with those "
        "of one rank, or there would be no table.",
        "dsp, ulysses and ring are VideoDiT on plain torch, sharded by its plan: they split "
        "pixels in front of the embedding and gather pixels behind the last layer, which is in their bytes. ulysses "
        "keeps frames sharded, ring patches, and they run inside the blocks that compute along these; with the other "
        "dim the bytes are the same, and ring's CPU seconds more. tp-sp is ParallelVideoDiT on Megatron-core with "
        "tensor_model_parallel_size P and sequence_parallel; it cuts tokens out of the video, and has no such border.",
        "TP-SP by formula, M the bytes of all tokens: 5 collectives of (P-1)/P M for each of self-attention, "
        "cross-attention and MLP, so 15 in a block and 30 in a space-time layer (10 in one of self-attention and MLP "
        "alone), and the modulations' few KiB. DSP has two switches of (P-1)/P^2 M in each pass of a layer: 7.5 P "
        "times less.",
        "gloo's reduce-scatter is an all-reduce, which sends twice the bytes. TP-SP has one by all-to-all here, as the "
        "library's own is, so that its bytes are those of its formula; Megatron's overlap in the backward pass is on.",
        "The wire's bytes are the mean of the interface counters of all namespaces: TCP/IP headers, acknowledgements "
        "and what starts and ends a step are in. By bandwidth: bytes by formula over the rate.",
        "CPU seconds are those of all ranks, with what gloo and the kernel's TCP spend. Of the step: over the cores "
        "that the ranks can use; where it is near 100% the machine's cores decide, not the link. One rank: the whole "
        "model on rank 0 while others wait, on one core.",
        "Gradients: the reduction that makes parameters' gradients exact on their ranks, timed by itself. dsp, ulysses "
        "and ring average those of all parameters, once for each optimizer step; data parallelism, ZeRO included, does "
        "that in any case, and then over all of its ranks. tp-sp has split most parameters.",
    ]


@dataclass(frozen=True)
class Point:
    """One contender as one rank saw it; bytes are those of each repeat."""

    step: Samples
    reduction: Samples
    ledger: list[int]
    wire: list[int]
    reduction_wire: list[int]
    loss: float


class _Taken:
    """The samples of one contender, as they come."""

    def __init__(self) -> None:
        self.step: list[list[Spent]] = []
        self.reduction: list[list[Spent]] = []
        self.ledger: list[int] = []
        self.wire: list[int] = []
        self.reduction_wire: list[int] = []


def measure(sizes: Sizes, repeats: int) -> dict[str, Point]:
    """On each rank: all contenders in turns, after a warm-up that also checks.

    Raises:
        AssertionError: a contender's loss or gradients are not those of the whole model.
    """
    contenders: dict[str, Contender] = {LOCAL: _OnFirst(sizes), "tp-sp": TensorParallel(sizes)}
    contenders |= {method: Planned(sizes, method) for method in PLANNED}
    losses: dict[str, float] = {}
    whole: dict[str, Tensor] = {}
    for name, contender in contenders.items():
        contender.step()
        contender.reduce()
        losses[name], gradients = contender.loss(), contender.gradients()
        if name == LOCAL:
            whole = gradients
        elif dist.get_rank() == 0:
            _check(name, losses[name] - losses[LOCAL], gradients, whole)
    taken = {name: _Taken() for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            mine = taken[name]
            with ledger() as log:
                spent, wire = _counted(contender.step)
            mine.step.append(spent)
            mine.wire.append(wire)
            mine.ledger.append(log.bytes())
            spent, wire = _counted(contender.reduce)
            mine.reduction.append(spent)
            mine.reduction_wire.append(wire)
    return {
        name: Point(
            Samples(mine.step), Samples(mine.reduction), mine.ledger, mine.wire, mine.reduction_wire, losses[name]
        )
        for name, mine in taken.items()
    }


class _OnFirst:
    """The whole model on rank 0, while others wait."""

    def __init__(self, sizes: Sizes) -> None:
        self._whole = Planned(sizes, None) if dist.get_rank() == 0 else None

    def step(self) -> None:
        """See `Contender`."""
        if self._whole is not None:
            self._whole.step()

    def reduce(self) -> None:
        """Nothing to do."""

    def loss(self) -> float:
        """See `Contender`; NaN elsewhere."""
        return float("nan") if self._whole is None else self._whole.loss()

    def gradients(self) -> dict[str, Tensor]:
        """See `Contender`; none elsewhere."""
        return {} if self._whole is None else self._whole.gradients()


def _check(name: str, loss_error: float, gradients: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """A fast wrong answer is no result."""
    assert abs(loss_error) < TOLERANCE, f"{name}: the loss is {loss_error:.1e} off"
    assert gradients.keys() == whole.keys(), name
    for parameter, gradient in gradients.items():
        error = (gradient - whole[parameter]).abs().max() / whole[parameter].abs().max()
        assert error < TOLERANCE, f"{name}: the gradient of {parameter} is {error:.1e} of its largest entry off"


def _counted(step: Callable[[], None]) -> tuple[list[Spent], int]:
    before = sent_bytes()
    spent = timed(step)
    # Until the other ranks have all, too.
    dist.barrier()
    return spent, sent_bytes() - before


def _rows(result: Result, sizes: Sizes, rate: int, points: list[dict[str, Point]]) -> None:
    ranks = len(points)

    def per_rank(name: str, which: str) -> float:
        return sum(median(getattr(point[name], which)) for point in points) / ranks / 2**20

    dsp = points[0]["dsp"]
    dsp_bytes = sent_bytes_by_formula("dsp", sizes, ranks)
    for name in PLANNED:
        formula, counted = sent_bytes_by_formula(name, sizes, ranks), [point[name].ledger for point in points]
        if any(count != formula for repeats in counted for count in repeats):
            result.failures.append(f"P={ranks}, {rate} Mbit/s: {name} sent {counted}, by formula {formula}")
    for name in (*CONTENDERS, LOCAL):
        point, alone = points[0][name], name == LOCAL
        formula = 0 if alone else sent_bytes_by_formula(name, sizes, ranks)
        cpu = sum(point.step.cpu_by_rank)
        floor = cpu / (1 if alone else min(ranks, cores()))
        wire = per_rank(name, "wire")
        result.rows.append(
            {
                "ranks": ranks,
                "rate": rate,
                "contender": name,
                "seconds": point.step.wall,
                "spread": point.step.spread,
                "ratio": point.step.wall / dsp.step.wall,
                "cpu": cpu,
                "cpu_floor": floor,
                "cpu_share": f"{floor / point.step.wall:.0%}",
                "by_bandwidth": None if alone else formula * 8 / (rate * 1e6),
                "ledger_mib": per_rank(name, "ledger") if name in PLANNED else None,
                "formula_mib": None if alone else formula / 2**20,
                "wire_mib": None if alone else wire,
                "overhead": None if alone else wire * 2**20 / formula,
                "bytes_ratio": None if alone else formula / dsp_bytes,
                "reduction": None if alone else point.reduction.wall,
                "reduction_mib": None if alone else per_rank(name, "reduction_wire"),
                "whole_ratio": (point.step.wall + (0 if alone else point.reduction.wall))
                / (dsp.step.wall + dsp.reduction.wall),
                "loss": point.loss,
                "samples": [[asdict(spent) for spent in repeat] for repeat in point.step.repeats],
                "samples_reduction": point.reduction.walls,
                "ledger_by_rank": [seen[name].ledger for seen in points],
                "wire_by_rank": [seen[name].wire for seen in points],
            }
        )


def _verdict(result: Result) -> list[str]:
    """Where DSP is ahead and by how much, what headers cost, and where the machine's cores decide."""
    if not result.rows:
        return []
    found = []
    for name in CONTENDERS[1:]:
        rows = _rows_of(result, name)
        sent = {row["ranks"]: f"{row['bytes_ratio']:.2f} (P={row['ranks']})" for row in rows}
        found.append(
            f"{name} takes {_listed(rows, 'ratio')} times as long as dsp, and sends {', '.join(sent.values())} times "
            "as much."
        )
    on_wire = {kind: [row["overhead"] for name in kind for row in _rows_of(result, name)] for kind in (PLANNED, TP_SP)}
    with_ledger, by_formula = (f"{min(ratios):.3f} to {max(ratios):.3f}" for ratios in on_wire.values())
    found.append(
        f"The wire carries {with_ledger} times what the ledgers of dsp, ulysses and ring count, and {by_formula} times "
        "what TP-SP's formula says."
    )
    computing = [row for name in CONTENDERS for row in _rows_of(result, name) if row["cpu_floor"] > row["by_bandwidth"]]
    names = ", ".join(f"{row['contender']} (P={row['ranks']}, {row['rate']} Mbit/s)" for row in computing)
    found.append(f"CPU seconds over the cores are more than the seconds by bandwidth in: {names or 'none'}.")
    found.append(
        f"One rank alone, which sends nothing, takes {_listed(_rows_of(result, LOCAL), 'ratio')} times as long as dsp."
    )
    return found


def _rows_of(result: Result, name: str) -> list[Row]:
    return [row for row in result.rows if row["contender"] == name]


def _listed(rows: list[Row], key: str) -> str:
    return ", ".join(f"{row[key]:.2f} (P={row['ranks']}, {row['rate']} Mbit/s)" for row in rows)


def draw(result: Result, path: Path) -> None:
    """Seconds of a step at every number of ranks and rate, and bytes."""
    figure, (seconds, sent) = plots.panels(2, "One space-time model: forward and backward")
    colors = ["#ff725c", plots.color("ulysses"), plots.color("ring zigzag"), "#6cc5b0"]
    places = list(dict.fromkeys((row["ranks"], row["rate"]) for row in result.rows))
    found = {(row["contender"], row["ranks"], row["rate"]): row for row in result.rows}
    plots.bars(
        seconds,
        [f"P={ranks}\n{rate} Mbit/s" for ranks, rate in places],
        {name: [found[name, *place]["seconds"] for place in places] for name in CONTENDERS},
        colors,
    )
    seconds.set_title("seconds per step")
    counts = {ranks: (ranks, rate) for ranks, rate in places}
    plots.bars(
        sent,
        [f"P={ranks}" for ranks in counts],
        {name: [found[name, *place]["formula_mib"] for place in counts.values()] for name in CONTENDERS},
        colors,
    )
    sent.set_title("MiB that a rank sends")
    for panel in (seconds, sent):
        panel.legend(fontsize=8)
    plots.save(figure, path)
