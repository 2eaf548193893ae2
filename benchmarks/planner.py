"""The planner's seconds beside measured steps: methods and sizes in turns, over links and nodes of known speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import plots
from benchmarks.measure import Samples, in_turns, timed
from benchmarks.netns import HostFailure, why_not
from benchmarks.netns_switch import switched
from benchmarks.progress import Advance
from benchmarks.result import Result
from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout, LayoutKind
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.method import Where
from dsp_plugin.planner.arrangement import Arrangement
from dsp_plugin.planner.cluster import Cluster
from dsp_plugin.planner.shapes import Shapes
from dsp_plugin.planner.time_model import time_of

NAME = "planner"
RANKS = 4
CLOSE = 0.10
"""Measured steps that are nearer to each other than this have no order."""


class Links(NamedTuple):
    """Hosts of a node, and megabits per second within a node and between nodes."""

    node: int
    within: int
    between: int


class Contender(NamedTuple):
    """A method as the planner knows it."""

    method: str
    ulysses: int
    ring: int
    order: LayoutKind

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.method} {self.order} {self.ulysses} x {self.ring}"


CONTENDERS = (
    Contender("ulysses", 4, 1, "contiguous"),
    Contender("usp", 2, 2, "zigzag"),
    Contender("ring", 1, 4, "zigzag"),
    Contender("ring", 1, 4, "contiguous"),
    Contender("lightseq", 1, 4, "contiguous"),
)
LINKS = (Links(1, 40, 40), Links(1, 400, 400), Links(2, 1000, 40))
KV_HEADS = (8, 2)
FULL_LENGTH, FULL_REPEATS = 4096, 5
QUICK_LENGTH, QUICK_REPEATS = 512, 1


def shapes_with(kv_heads: int) -> Shapes:
    """Two layers whose heads share keys and values or not; the head is as good as absent."""
    return Shapes(2, 256, 8, kv_heads, 32, 512, 1)


def steps(quick: bool) -> int:
    """How often `run` advances."""
    return len(_points(quick))


def _points(quick: bool) -> list[tuple[Links, int]]:
    return [(LINKS[2], 2)] if quick else [(links, kv_heads) for links in LINKS for kv_heads in KV_HEADS]


def run(quick: bool, advance: Advance) -> Result:
    """Measure every contender over every kind of links, if namespaces and shaping are permitted."""
    length, repeats = (QUICK_LENGTH, QUICK_REPEATS) if quick else (FULL_LENGTH, FULL_REPEATS)
    result = Result(
        NAME,
        "The planner's time model beside measured steps",
        {
            "model": "2 layers of causal attention and a gated MLP, h=256, H=8, D=32, I=512, fp32, B=1",
            "L": length,
            "P": RANKS,
            "links": "a network namespace per rank on a bridge, what it sends to its node and to others shaped by tc "
            "htb; gloo over TCP",
            "repeats": repeats,
        },
        {
            "node": "ranks of a node",
            "within": "Mbit/s within",
            "between": "Mbit/s between",
            "kv_heads": "K",
            "contender": "contender",
            "measured": "s measured",
            "spread": "spread",
            "predicted": "s predicted",
            "ratio": "measured / fastest",
            "told": "predicted / its fastest",
            "error": "error of the ratio",
            "order": "pairs in order",
        },
        ["node", "between", "kv_heads", "contender", "measured", "spread", "predicted", "ratio", "told", "error"],
        notes=[
            "A step is forward and backward of all layers, without the mean of gradients: the slowest rank's, medians "
            "of repeats in turns.",
            "What a rank computes and copies per second, and what a collective of few bytes takes, are measured in the "
            "same world just before, on all ranks at once; bandwidths are those that tc was told.",
            f"Pairs in order: of the pairs whose measured steps differ by more than {CLOSE:.0%}, those that the model "
            "puts in the same order.",
        ],
    )
    reason = why_not(shaped=True)
    if reason is not None:
        result.skipped = reason
        return result
    for links, kv_heads in _points(quick):
        advance(f"{links.node} to a node, {links.between} Mbit/s, K={kv_heads}")
        try:
            with switched(RANKS) as switch:
                switch.shape_nodes(links.node, links.within, links.between)
                ranks = switch.hosts.run(measure, kv_heads, length, repeats, timeout=900.0)
        except HostFailure as failure:
            result.failures.append(f"{links}, K={kv_heads}: {failure}")
            continue
        result.rows += _rows(links, kv_heads, length, ranks[0])
    return result


@dataclass(frozen=True)
class Measured:
    """What was measured in one world.

    Attributes:
        steps: of every contender, by name.
        rates: operations per second in products and in attention, bytes per second copied.
        latency: seconds of a small collective.
    """

    steps: dict[str, Samples]
    rates: tuple[float, float, float]
    latency: float


class _Layer(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        width, inside = shapes.hidden, shapes.intermediate
        self.sizes = [count * shapes.head_dim for count in (shapes.heads, shapes.kv_heads, shapes.kv_heads)]
        self.head_dim = shapes.head_dim
        self.qkv, self.out = nn.Linear(width, sum(self.sizes), bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * inside, bias=False), nn.Linear(inside, width, bias=False)

    def forward(self, x_BnC: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        parts = self.qkv(x_BnC).split(self.sizes, -1)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).contiguous() for part in parts)
        x_BnC = x_BnC + self.out(attend(q, k, v).flatten(2))
        gate, up = self.up(x_BnC).chunk(2, -1)
        return x_BnC + self.down(F.silu(gate) * up)


def measure(kv_heads: int, length: int, repeats: int) -> Measured:
    """On each rank: the rates of this machine, and the steps of all contenders in turns."""
    torch.manual_seed(dist.get_rank())
    shapes = shapes_with(kv_heads)
    layers = [_Layer(shapes) for _ in range(shapes.layers)]
    rates = _rates(shapes, layers, length // RANKS, repeats)
    runs = {each.name: _step(shapes, layers, each, length) for each in CONTENDERS}
    for once in runs.values():
        once()
    return Measured(in_turns(runs, repeats), rates, _latency())


def _step(shapes: Shapes, layers: list[_Layer], each: Contender, length: int) -> Callable[[], None]:
    sizes = {"ulysses_size": each.ulysses, "ring_size": each.ring}
    config = SequenceParallelConfig(method=each.method, layout=each.order, **sizes)
    groups = SequenceParallelGroups.build(config)
    layout = Layout(each.order, length, RANKS)
    what, where = AttentionSpec(MaskSpec(causal=True)), Where(groups, layout)
    method = METHODS[each.method].attention
    assert method is not None
    x = torch.randn(1, layout.sizes[groups.sp.rank], shapes.hidden, requires_grad=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = method(q, k, v, what=what, where=where)
        return out

    return _forward_and_backward(layers, x, attend)


def _forward_and_backward(layers: list[_Layer], x: Tensor, attend: Callable[..., Tensor]) -> Callable[[], None]:
    def step() -> None:
        y = x
        for layer in layers:
            y = layer(y, attend)
        y.sum().backward()

    return step


def _rates(shapes: Shapes, layers: list[_Layer], tokens: int, repeats: int) -> tuple[float, float, float]:
    """Of all ranks at once, without any wire between them."""
    x = torch.randn(1, tokens, shapes.hidden, requires_grad=True)
    products = _forward_and_backward(layers, x, lambda q, k, v: q)
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method="ulysses", size=1))
    what, where = AttentionSpec(MaskSpec(causal=True)), Where(groups, Layout("contiguous", tokens, 1))
    q, k, v = (
        torch.randn(1, tokens, heads, shapes.head_dim, requires_grad=True)
        for heads in (shapes.heads, shapes.kv_heads, shapes.kv_heads)
    )
    method = METHODS["ulysses"].attention
    assert method is not None
    total, part = torch.zeros_like(q), torch.randn_like(q)

    def attend() -> None:
        method(q, k, v, what=what, where=where).sum().backward()

    def copy() -> None:
        for _ in range(10):
            total.add_(part)

    runs: Mapping[str, Callable[[], None]] = {"products": products, "attention": attend, "copies": copy}
    for once in runs.values():
        once()
    taken = {name: samples.wall for name, samples in in_turns(runs, max(repeats, 3)).items()}
    # As `time_model` counts them: three products to a weight, attention's backward pass at 2.5 times its forward pass.
    multiplied = 6 * tokens * (shapes.multiplied - shapes.head_parameters)
    pairs = MaskSpec(causal=True).pairs(tokens)
    attended = 3.5 * 4 * shapes.heads * shapes.head_dim * pairs
    copied = 10 * 3 * 4 * total.numel()
    return multiplied / taken["products"], attended / taken["attention"], copied / taken["copies"]


def _latency() -> float:
    sent = torch.zeros(RANKS)
    return median(
        max(spent.wall for spent in timed(lambda: dist.all_to_all_single(torch.empty_like(sent), sent)))
        for _ in range(20)
    )


def predicted(links: Links, kv_heads: int, length: int, measured: Measured) -> dict[str, float]:
    """Seconds by contender."""
    products, attention, copies = measured.rates
    bits = 1e6 / 8
    cluster = Cluster(
        RANKS,
        links.node,
        flops=1.0,
        device_bytes=1 << 40,
        host_bytes=1 << 40,
        intra=links.within * bits,
        inter=links.between * bits,
        host=1e12,
        memory=copies,
        product_share=products,
        attention_share=attention,
        latency=measured.latency,
    )
    found, shapes = {}, shapes_with(kv_heads)
    for each in CONTENDERS:
        how = Arrangement(
            "deepspeed",
            RANKS,
            links.node,
            each.method,
            each.ulysses,
            each.ring,
            recompute="none",
            order=each.order,
            element_size=4,
        )
        time = time_of(shapes, how, length, cluster)
        found[each.name] = time.products + time.attention + time.exchange
    return found


def _rows(links: Links, kv_heads: int, length: int, measured: Measured) -> list[dict[str, Any]]:
    told = predicted(links, kv_heads, length, measured)
    walls = {name: samples.wall for name, samples in measured.steps.items()}
    pairs = [(a, b) for a, b in combinations(walls, 2) if abs(walls[a] - walls[b]) > CLOSE * min(walls[a], walls[b])]
    right = sum((walls[a] < walls[b]) == (told[a] < told[b]) for a, b in pairs)
    fastest, foretold = min(walls.values()), min(told.values())
    return [
        {
            "node": links.node,
            "within": links.within,
            "between": links.between,
            "kv_heads": kv_heads,
            "contender": name,
            "measured": walls[name],
            "spread": samples.spread,
            "predicted": told[name],
            "ratio": walls[name] / fastest,
            "told": told[name] / foretold,
            "error": f"{(told[name] / foretold) / (walls[name] / fastest) - 1:+.0%}",
            "order": f"{right} of {len(pairs)}",
            "samples": samples.walls,
            "rates": list(measured.rates),
            "latency": measured.latency,
        }
        for name, samples in measured.steps.items()
    ]


def draw(result: Result, path: Path) -> None:
    """Measured against predicted seconds."""
    figure, (panel,) = plots.panels(1, result.title)
    for each in CONTENDERS:
        rows = [row for row in result.rows if row["contender"] == each.name]
        measured, told = [row["measured"] for row in rows], [row["predicted"] for row in rows]
        panel.plot(measured, told, "o", color=plots.color(each.name), label=each.name)
    most = max(max(row["measured"], row["predicted"]) for row in result.rows)
    panel.plot([0, most], [0, most], color="0.7", zorder=0)
    panel.set_xlabel("seconds measured")
    panel.set_ylabel("seconds predicted")
    panel.legend(fontsize=8)
    plots.save(figure, path)
