"""The planner's seconds beside measured steps: methods and sizes in turns, over links and nodes of known speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import plots
from benchmarks.measure import Samples, in_turns, timed
from benchmarks.netns import HostFailure, why_not
from benchmarks.netns_switch import switched
from benchmarks.progress import Advance
from benchmarks.result import Result
from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.kernels.kernel import BlockSpec, Kernel
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.kernels.table import KERNELS
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
PRODUCTS, ATTENTION = 4e9, 2e9
"""Operations per second of a rank that sleeps for as long as they would take."""
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
LINKS = (Links(1, 40, 40), Links(1, 160, 160), Links(2, 400, 40))
KV_HEADS = (8, 2)
FULL_LENGTH, FULL_REPEATS = 2048, 3
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
            "model": "2 layers of causal attention and a gated MLP, h=256, H=8, D=32, I=512, fp32, B=1; what is "
            f"computed is slept, products at {PRODUCTS:.0e} and attention at {ATTENTION:.0e} operations per second",
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
            "Computing is sleeping, as if an accelerator computed: this machine's cores are left to what is sent. What "
            "a rank copies per second and what a collective of few bytes takes are measured in the same world; "
            "bandwidths are those that tc was told.",
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
        copies: bytes per second that a rank reads and writes, on all ranks at once.
        latency: seconds of a small collective.
    """

    steps: dict[str, Samples]
    copies: float
    latency: float


class _Sleeping(Kernel):
    """Takes as long as attention of a block would at `ATTENTION`, and computes nothing."""

    name = "sleep"

    def available(self) -> tuple[bool, str]:
        return True, "sleeps"

    def version(self) -> str | None:
        return None

    def supports(
        self, dtype: torch.dtype, device: torch.device, head_dim: int, v_head_dim: int, spec: AttentionSpec
    ) -> str | None:
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> tuple[Tensor, Tensor]:
        time.sleep(_operations(q, k, block) / ATTENTION)
        return torch.zeros(*q.shape[:3], v.shape[-1]), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: BlockSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        time.sleep(2.5 * _operations(q, k, block) / ATTENTION)
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def _operations(q: Tensor, k: Tensor, block: BlockSpec) -> float:
    """Of the forward pass over the pairs within reach."""
    (left, right), keys = block.band, k.shape[1]
    i = torch.arange(q.shape[1])
    first = torch.zeros_like(i) if left is None else (i - left).clamp(min=0)
    last = torch.full_like(i, keys - 1) if right is None else (i + right).clamp(max=keys - 1)
    pairs = int((last - first + 1).clamp(min=0).sum())
    return 4.0 * q.shape[0] * q.shape[2] * q.shape[3] * pairs


class _Products(torch.autograd.Function):
    """Takes as long as a layer's products would, twice that on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(2 * ctx.seconds)
        return grad, None


def measure(kv_heads: int, length: int, repeats: int) -> Measured:
    """On each rank: the steps of all contenders in turns, what a rank copies, and what a small collective takes."""
    KERNELS[_Sleeping.name] = _Sleeping()
    shapes = shapes_with(kv_heads)
    runs = {each.name: _step(shapes, each, length) for each in CONTENDERS}
    for once in runs.values():
        once()
    latency = _latency()
    return Measured(in_turns(runs, repeats), _copies(), latency)


def _step(shapes: Shapes, each: Contender, length: int) -> Callable[[], None]:
    sizes = {"ulysses_size": each.ulysses, "ring_size": each.ring}
    config = SequenceParallelConfig(method=each.method, layout=each.order, **sizes)
    groups = SequenceParallelGroups.build(config)
    layout = Layout(each.order, length, RANKS)
    what, where = AttentionSpec(MaskSpec(causal=True), kernel=_Sleeping.name), Where(groups, layout)
    method = METHODS[each.method].attention
    assert method is not None
    tokens = layout.sizes[groups.sp.rank]
    products = 2 * tokens * (shapes.multiplied - shapes.head_parameters) / shapes.layers / PRODUCTS
    q, k, v = (
        torch.randn(1, tokens, heads, shapes.head_dim, requires_grad=True)
        for heads in (shapes.heads, shapes.kv_heads, shapes.kv_heads)
    )

    def step() -> None:
        x = q
        for _ in range(shapes.layers):
            x = method(_Products.apply(x, products), k, v, what=what, where=where)
        x.sum().backward()

    return step


def _copies() -> float:
    total, part = torch.zeros(1 << 18), torch.ones(1 << 18)

    def copy() -> None:
        for _ in range(10):
            total.add_(part)

    copy()
    taken = median(max(spent.wall for spent in timed(copy)) for _ in range(5))
    return 10 * 3 * 4 * total.numel() / taken


def _latency() -> float:
    sent = torch.zeros(RANKS)
    return median(
        max(spent.wall for spent in timed(lambda: dist.all_to_all_single(torch.empty_like(sent), sent)))
        for _ in range(20)
    )


def predicted(links: Links, kv_heads: int, length: int, measured: Measured) -> dict[str, float]:
    """Seconds by contender."""
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
        memory=measured.copies,
        product_share=PRODUCTS,
        attention_share=ATTENTION,
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
        told = time_of(shapes, how, length, cluster)
        found[each.name] = told.products + told.attention + told.exchange
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
            "copies": measured.copies,
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
