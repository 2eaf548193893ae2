"""Seconds of one step, from operations, bytes and link speeds; docs/planning.md states how the model was checked.

What runs beside compute is subtracted from it: a ring's hop beside the attention of the hop before, ZeRO's weights and
gradients beside the products of the pass that they belong to, checkpoints on their way to host memory and back. What is
waited for is added: Ulysses' all-to-alls, tensor parallelism's collectives, pipeline bubbles, and the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from dsp_plugin.layout import Layout, shard_sizes
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import METHODS, WireBytes, Workload
from dsp_plugin.methods import ulysses as ulysses_method
from dsp_plugin.methods.lightseq import Schedule
from dsp_plugin.planner.arrangement import Arrangement
from dsp_plugin.planner.cluster import Cluster
from dsp_plugin.planner.memory_model import memory_of, rank_parameters, rounds_of
from dsp_plugin.planner.shapes import Shapes

# Operations of a backward pass for one of the forward pass. Flash attention computes its scores again.
_PRODUCTS_BACK, _ATTENTION_BACK = 2.0, 2.5
# Bytes of device memory that the optimizer reads and writes to a parameter: gradient, moments and weights.
_OPTIMIZER = 34


class Time(NamedTuple):
    """Seconds of one step of the busiest rank.

    Attributes:
        products: with weights, recomputation and tiles included.
        attention: likewise, as long as the rank with most of it takes.
        exchange: of the sequence's ranks, as far as it is waited for.
        states: weights and gradients between all ranks, likewise.
        tensor: of tensor-parallel ranks.
        copies: to host memory and back, as far as they are waited for.
        bubble: what a pipeline waits for at its ends.
        optimizer: its update.
    """

    products: float
    attention: float
    exchange: float
    states: float
    tensor: float
    copies: float
    bubble: float
    optimizer: float

    @property
    def step(self) -> float:
        """All of it."""
        return sum(self)


def tokens_per_second(shapes: Shapes, how: Arrangement, length: int, time: Time) -> float:
    """Of one device."""
    return length * how.micro_batches * how.replicas / (time.step * how.ranks)


def time_of(shapes: Shapes, how: Arrangement, length: int, cluster: Cluster) -> Time:
    """What a step over sequences of ``length`` tokens takes."""
    here, tokens = shapes.of_stage(how.pipeline), shard_sizes(length, how.size)[0]
    passes = {"full": 2, "keep_attention": 1, "none": 1}[how.recompute]
    again = 0 if how.recompute == "none" else 1
    forward = _products(here, how, tokens) / (cluster.flops * cluster.product_share)
    head = 6 * tokens * shapes.head_parameters / how.tensor / (cluster.flops * cluster.product_share)
    # A tile's inside is made again in the backward pass, but is left out where a layer is run again.
    tiles = _mlp_share(here) * forward if how.memory.mlp_tiles > 1 and not again else 0.0
    products = forward * (1 + again + _PRODUCTS_BACK) + tiles + head
    attention = exchange = 0.0
    merged, added = _merging(shapes, how, tokens, cluster)
    attention += here.layers * (passes * merged + added)
    for window, count in here.kinds().items():
        one = attention_seconds(shapes, how, length, window, cluster)
        out, back = exchange_seconds(shapes, how, length, window, cluster)
        attention += count * one * (passes + _ATTENTION_BACK)
        exchange += count * (passes * out + back)
    tensor = here.layers * (2 + again) * _tensor_pass(here, how, tokens, cluster)
    out_and_back = (forward, forward * _PRODUCTS_BACK + attention)
    copies = _copies(shapes, how, length, out_and_back, cluster)
    micro = (products, attention, exchange, tensor, copies)
    total = tuple(how.micro_batches * part for part in micro)
    bubble = (how.pipeline - 1) * (sum(micro) + _handover(here, how, tokens, cluster))
    states = _states(shapes, how, products + attention, 2 + again, cluster)
    share = rank_parameters(shapes, how) / (how.sharing if how.stage else 1)
    return Time(total[0], total[1], total[2], states, total[3], total[4], bubble, share * _OPTIMIZER / cluster.memory)


def attention_seconds(shapes: Shapes, how: Arrangement, length: int, window: int | None, cluster: Cluster) -> float:
    """Of the forward pass of one layer, on the rank with most to do."""
    pairs = shapes.mask_of(window).pairs(length) / how.size * imbalance(how, length, shapes.mask_of(window))
    heads = max(shapes.heads // how.tensor, 1)
    if how.ulysses > 1:
        part = ulysses_method.head_partition(heads, max(shapes.kv_heads // how.tensor, 1), how.ulysses)
        heads = max(map(len, part.queries)) * how.ulysses
    return 4 * heads * shapes.head_dim * pairs / (cluster.flops * cluster.attention_share)


def _merging(shapes: Shapes, how: Arrangement, tokens: int, cluster: Cluster) -> tuple[float, float]:
    """What a ring spends on partial results in one layer, forward and backward, all of it reading and writing memory.

    A hop's output (bf16) is merged into the one in fp32: 10 bytes a value; its gradients are added to those in fp32, 10
    bytes a value of queries, and of keys and values 10 and the zeros that they start from, 4.
    """
    if how.ring == 1:
        return 0.0, 0.0
    hops = how.ring // 2 + 1 if how.method == "lightseq" else how.ring
    queries, keys = (tokens * count * shapes.head_dim / how.tensor for count in (shapes.heads, 2 * shapes.kv_heads))
    return hops * 10 * queries / cluster.memory, hops * (10 * queries + 14 * keys) / cluster.memory


def imbalance(how: Arrangement, length: int, mask: MaskSpec) -> float:
    """How much more the rank with most pairs has than the mean of all; ranks of a ring wait for it."""
    if how.ring == 1:
        return 1.0
    layout = Layout(how.layout, length, how.ring)
    if how.method == "lightseq":
        runs = tuple(run for rank in range(how.ring) for run in layout.spans(rank)[:1])
        return 1 / (1 - Schedule(runs, mask).idle_share()) if len(runs) == how.ring else 1.0
    most = max(_visible(layout.spans(rank), mask) for rank in {0, how.ring // 2, how.ring - 1})
    return max(most * how.ring / max(mask.pairs(length), 1), 1.0)


def exchange_seconds(
    shapes: Shapes, how: Arrangement, length: int, window: int | None, cluster: Cluster
) -> tuple[float, float]:
    """What is waited for in one layer, forward and backward.

    Ulysses is waited for but for its rounds: of C rounds all but one run beside attention.
    """
    if how.size == 1:
        return 0.0, 0.0
    inner, outer = wire_bytes(shapes, how, length, window)
    one = attention_seconds(shapes, how, length, window, cluster)
    computing = (one, one * _ATTENTION_BACK)
    waited = [0.0, 0.0]
    stride, members = how.tensor, cluster.on_one_node(how.tensor, how.ulysses)
    rounds = rounds_of(shapes, how, length)
    for way in range(2):
        if how.ulysses > 1:
            crossing = (how.ulysses - members) / (how.ulysses - 1)
            travel = max(inner[way] * crossing / cluster.inter, inner[way] * (1 - crossing) / cluster.intra)
            hidden = min(travel * (rounds - 1) / rounds, computing[way] * (rounds - 1) / rounds)
            waited[way] += travel - hidden + 2 * rounds * cluster.latency
        if how.ring > 1:
            hops = how.ring // 2 if how.method == "lightseq" else how.ring - 1
            link = cluster.inter if cluster.across(stride * how.ulysses, how.ring) else cluster.intra
            travel = outer[way] / hops / link + cluster.latency
            waited[way] += hops * max(travel - computing[way] / (hops + 1), 0.0)
    return waited[0], waited[1]


def wire_bytes(shapes: Shapes, how: Arrangement, length: int, window: int | None) -> tuple[WireBytes, WireBytes]:
    """Bytes leaving a rank in one layer: those between Ulysses' ranks, and those on the ring.

    By the methods' own formulas; of the first, the middle and the last rank the one that sends most.
    """
    workload = Workload(
        size=how.size,
        heads=max(shapes.heads // how.tensor, 1),
        kv_heads=max(shapes.kv_heads // how.tensor, 1),
        length=length,
        head_dim=shapes.head_dim,
        element_size=how.element_size,
        layout=how.layout,
        mask=shapes.mask_of(window),
        ulysses_size=how.ulysses,
    )
    most = _most_sent(how.method, workload)
    if how.ring == 1:
        return most, WireBytes(0, 0)
    if how.ulysses == 1:
        return WireBytes(0, 0), most
    first = workload.tokens().sizes[: how.ulysses]
    around = ulysses_method.wire_bytes_of_shard(replace(workload, size=how.ulysses), 0, first)
    return around, WireBytes(max(most.forward - around.forward, 0), max(most.backward - around.backward, 0))


@lru_cache(maxsize=1024)
def _most_sent(method: str, workload: Workload) -> WireBytes:
    ranks = {0, workload.size // 2, workload.size - 1}
    sent = [METHODS[method].wire_bytes(workload, rank) for rank in ranks]
    return WireBytes(max(wire.forward for wire in sent), max(wire.backward for wire in sent))


def _visible(runs: Iterable[range], mask: MaskSpec) -> int:
    """Pairs that the queries of contiguous runs see."""
    left = mask.band()[0]
    return sum(_before(run.stop, left) - _before(run.start, left) for run in runs)


def _before(stop: int, left: int | None) -> int:
    """Pairs of the first ``stop`` queries."""
    return MaskSpec(causal=True, window=None if left is None else (left, 0)).pairs(stop)


def _products(shapes: Shapes, how: Arrangement, tokens: int) -> float:
    """Operations of one forward pass over the layers of a stage."""
    return 2 * tokens * (shapes.multiplied - shapes.head_parameters) / how.tensor


def _mlp_share(shapes: Shapes) -> float:
    attention = shapes.layers * shapes.attention_parameters
    return 1 - attention / (shapes.multiplied - shapes.head_parameters)


def _tensor_pass(shapes: Shapes, how: Arrangement, tokens: int, cluster: Cluster) -> float:
    """Two all-reduces of the hidden states, or as much in other collectives, in one pass over a layer."""
    if how.tensor == 1:
        return 0.0
    link = cluster.inter if cluster.across(1, how.tensor) else cluster.intra
    sent = 2 * (how.tensor - 1) / how.tensor * tokens * shapes.hidden * 2
    return 2 * (sent / link + cluster.latency)


def _handover(shapes: Shapes, how: Arrangement, tokens: int, cluster: Cluster) -> float:
    """Activations from stage to stage, and their gradients back."""
    if how.pipeline == 1:
        return 0.0
    return 2 * (tokens * shapes.hidden * 2 / how.tensor / cluster.inter + cluster.latency)


def _copies(shapes: Shapes, how: Arrangement, length: int, beside: tuple[float, float], cluster: Cluster) -> float:
    if not how.memory.offload:
        return 0.0
    each_way = memory_of(shapes, how, length).host / cluster.host
    return sum(max(each_way - computing, 0.0) for computing in beside)


def _states(shapes: Shapes, how: Arrangement, computing: float, gathers: int, cluster: Cluster) -> float:
    """Gradients are summed in fp32, weights gathered in bf16.

    Args:
        computing: seconds of one micro batch, beside which transfers run.
        gathers: how often ZeRO 3 makes weights whole in a micro batch.
    """
    ranks = how.sharing
    if ranks == 1:
        return 0.0
    part = rank_parameters(shapes, how) * (ranks - 1) / ranks
    here = cluster.on_one_node(how.tensor, ranks)
    link = min(cluster.intra, here * cluster.inter) if cluster.across(how.tensor, ranks) else cluster.intra
    # A reduction leaves every rank a part; without ZeRO the parts are gathered at once, as they are.
    reduced, gathered = 4 * part / link * (1 if how.stage else 2), 2 * part / link
    latency = cluster.latency * shapes.layers / how.pipeline
    if how.framework == "deepspeed" and how.stage == 3:
        each = reduced + gathers * gathered + (gathers + 1) * latency
        return how.micro_batches * max(each - computing, 0.0)
    turns = how.micro_batches if how.framework == "deepspeed" and how.stage == 2 else 1
    after = gathered if how.stage else 0.0
    # The backward pass is about two thirds of the computing, and gradients travel beside it.
    return turns * max(reduced + latency - computing * 2 / 3, 0.0) + after
