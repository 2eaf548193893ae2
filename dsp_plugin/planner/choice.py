"""The ways to train a model on a cluster: all of them, judged by memory and time, the best first, with reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any

from dsp_plugin.config.memory import AUTO_ATTENTION_BYTES, Bytes, MemoryConfig
from dsp_plugin.methods import METHODS, Workload
from dsp_plugin.planner.arrangement import Arrangement, Framework, Recompute
from dsp_plugin.planner.cluster import Cluster
from dsp_plugin.planner.memory_model import (
    Memory,
    gathered_bytes,
    memory_of,
    mlp_tiles_for,
    tile_tokens_for,
)
from dsp_plugin.planner.shapes import Shapes
from dsp_plugin.planner.time_model import Time, time_of, tokens_per_second

RECOMPUTE: tuple[Recompute, ...] = ("none", "keep_attention", "full")
_GIB, _MIB = 1 << 30, 1 << 20
_STEP = 1024
# No planner's question: beyond, a length is a mistake.
_LONGEST = 1 << 34


@dataclass(frozen=True)
class Task:
    """What is asked.

    Attributes:
        shapes: of the model.
        cluster: what it is trained on.
        framework: with which.
        length: tokens of a sequence; None for as many as fit.
        micro_batches: sequences that a replica takes one after another in a step.
        reserve: bytes of a device that are nobody's: the runtime's, the transport's, fragments.
        methods: that may be chosen; empty for all.
        tensor, pipeline, stage, recompute: to be had in any case; None for any.
    """

    shapes: Shapes
    cluster: Cluster
    framework: Framework = "deepspeed"
    length: int | None = None
    micro_batches: int = 1
    reserve: int = 4 * _GIB
    methods: tuple[str, ...] = ()
    tensor: int | None = None
    pipeline: int | None = None
    stage: int | None = None
    recompute: Recompute | None = None

    @property
    def device_bytes(self) -> int:
        """What a step may use of a device."""
        return self.cluster.device_bytes - self.reserve

    @property
    def host_bytes(self) -> int:
        """What checkpoints of one rank may take of its node's memory: nine tenths of its share."""
        return self.cluster.host_bytes // self.cluster.node * 9 // 10


@dataclass(frozen=True)
class Judged:
    """An arrangement, and what came out.

    Attributes:
        length: of its sequences.
        memory, time: None where it cannot run at all.
        over: bytes by which it does not fit; 0 where it does.
        rate: tokens per second and device.
        reason: why it lost, in words; empty for the winner.
    """

    how: Arrangement
    length: int
    memory: Memory | None = None
    time: Time | None = None
    over: int = 0
    rate: float = 0.0
    reason: str = ""

    @property
    def fits(self) -> bool:
        """Whether it can run."""
        return self.time is not None and not self.over


def choose(task: Task) -> list[Judged]:
    """One of every layout (method, sizes), the best first; and of the winner's the other ways to hold its states.

    Of each layout the stage, recomputation and parts of `memory` that are fastest are taken; where nothing fits, what
    comes nearest.
    """
    best = [_best_of(task, layout) for layout in _layouts(task)]
    order = _order(task)
    ranked = sorted((found for found in best if found.fits), key=order)
    misfits = sorted((found for found in best if not found.fits), key=lambda found: found.over or float("inf"))
    if not ranked:
        return [replace(found, reason=_why_not(task, found)) for found in misfits]
    winner = ranked[0]
    others = [
        _judged(task, replace(winner.how, stage=stage, recompute=recompute), winner.length)
        for stage in _stages(task)
        for recompute in _recomputes(task)
        if (stage, recompute) != (winner.how.stage, winner.how.recompute)
    ]
    ranked = sorted([*ranked[1:], *(found for found in others if found.fits)], key=order)
    lost = [*ranked, *(found for found in others if not found.fits), *misfits]
    return [winner, *(replace(found, reason=_why_lost(task, winner, found)) for found in lost)]


def memory_for(
    shapes: Shapes, how: Arrangement, length: int, device_bytes: int | None, host_bytes: int
) -> MemoryConfig | None:
    """The least costly parts of `memory` by which a step fits; None where none do.

    From part to part: the head's tiles, tiles of MLPs and rounds of heads, which cost launches, and tiles of MLPs a
    forward pass more where layers are not recomputed; then checkpoints in host memory, which cost copies beside the
    computing. A later one is taken only where the earlier ones together do not suffice. Their sizes are those of
    ``"auto"``.

    Args:
        how: its ``memory`` is of no interest.
        device_bytes: for what `memory_of` counts; None for the parts that leave least on the device.
        host_bytes: for checkpoints of one rank.
    """
    least, sparest = None, None
    for parts in range(16):
        found = _with_parts(shapes, how, length, parts, host_bytes)
        if found is None:
            continue
        taken = memory_of(shapes, replace(how, memory=found), length).device
        if device_bytes is not None and taken <= device_bytes:
            return found
        if least is None or taken < least:
            least, sparest = taken, found
    return sparest if device_bytes is None else None


def _with_parts(shapes: Shapes, how: Arrangement, length: int, parts: int, host_bytes: int) -> MemoryConfig | None:
    """The parts whose bits are set, in the sizes of ``"auto"``; None where one of them would change nothing."""
    tile, tiles, rounds, offload = (bool(parts & bit) for bit in (1, 2, 4, 8))
    settings: dict[str, Any] = {}
    if tile:
        settings["tile_tokens"] = tile_tokens_for(shapes, how)
    if rounds:
        if how.ulysses == 1 or gathered_bytes(shapes, how, length) <= AUTO_ATTENTION_BYTES:
            return None
        settings["attention_rounds"] = Bytes(AUTO_ATTENTION_BYTES)
    if offload:
        if how.recompute == "none" or host_bytes < _MIB:
            return None
        everything = memory_of(shapes, replace(how, memory=MemoryConfig(offload=True)), length).host
        settings["offload"] = True if everything <= host_bytes else Bytes(host_bytes // _MIB * _MIB)
    if tiles:
        count = mlp_tiles_for(shapes, how, length)
        if count == 1:
            return None
        settings["mlp_tiles"] = count
    return MemoryConfig(**settings)


def _order(task: Task) -> Callable[[Judged], tuple[float, ...]]:
    def key(found: Judged) -> tuple[float, ...]:
        how, longest = found.how, -found.length if task.length is None else 0
        # The model is not exact to a hundredth: of what is about as fast, the simpler one.
        about = -round(log(found.rate) * 100)
        parts = len(how.memory.model_fields_set)
        return longest, about, how.tensor * how.pipeline, parts, how.method == "usp", how.stage, -found.rate

    return key


def _layouts(task: Task) -> Iterator[Arrangement]:
    cluster = task.cluster
    for tensor in _tensor_sizes(task):
        for pipeline in _pipeline_sizes(task, tensor):
            most = cluster.ranks // (tensor * pipeline)
            for size in _divisors(most):
                for method, ulysses in methods_of_size(size, task.methods):
                    yield Arrangement(
                        task.framework,
                        cluster.ranks,
                        cluster.node,
                        method,
                        ulysses,
                        size // ulysses,
                        tensor,
                        pipeline,
                        micro_batches=task.micro_batches,
                    )


def methods_of_size(size: int, allowed: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
    """The methods that may share a sequence among ``size`` ranks, each with its U; the simplest first."""
    allowed = allowed or ("ulysses", "usp", "ring", "lightseq")
    if size == 1:
        yield allowed[0], 1
        return
    for method in allowed:
        if method == "usp":
            yield from ((method, ulysses) for ulysses in _divisors(size)[::-1] if 1 < ulysses < size)
        else:
            yield method, size if method == "ulysses" else 1


def illegal(shapes: Shapes, how: Arrangement, length: int) -> list[str]:
    """Why the method cannot serve the model."""
    workload = Workload(
        how.size,
        max(shapes.heads // how.tensor, 1),
        max(shapes.kv_heads // how.tensor, 1),
        length=length,
        ulysses_size=how.ulysses,
    )
    return METHODS[how.method].illegal(workload)


def _best_of(task: Task, layout: Arrangement) -> Judged:
    """The fastest that fits; of none the one that is over by least."""
    reasons = illegal(task.shapes, layout, task.length or _STEP)
    if reasons:
        return Judged(layout, task.length or 0, reason=" ".join(reasons))
    length = task.length if task.length is not None else _longest(task, layout)
    if length == 0:
        return _judged(task, replace(layout, stage=_stages(task)[-1], recompute=_recomputes(task)[-1]), _STEP)
    judged = [
        _judged(task, replace(layout, stage=stage, recompute=recompute), length)
        for stage in _stages(task)
        for recompute in _recomputes(task)
    ]
    fitting = [found for found in judged if found.fits]
    return min(fitting, key=_order(task)) if fitting else min(judged, key=lambda found: found.over)


def _judged(task: Task, how: Arrangement, length: int) -> Judged:
    found = memory_for(task.shapes, how, length, task.device_bytes, task.host_bytes)
    how = replace(how, memory=found or memory_for(task.shapes, how, length, None, task.host_bytes) or MemoryConfig())
    memory = memory_of(task.shapes, how, length)
    over = max(memory.device - task.device_bytes, 0)
    time = time_of(task.shapes, how, length, task.cluster)
    return Judged(how, length, memory, time, over, tokens_per_second(task.shapes, how, length, time))


def _longest(task: Task, layout: Arrangement) -> int:
    """The longest sequences that fit, in steps of 1024 tokens."""
    how = replace(layout, stage=_stages(task)[-1], recompute=_recomputes(task)[-1])

    def fits(steps: int) -> bool:
        return memory_for(task.shapes, how, steps * _STEP, task.device_bytes, task.host_bytes) is not None

    low, high = 0, 1
    while high * _STEP < _LONGEST and fits(high):
        low, high = high, 2 * high
    while low + max(low // 256, 1) < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * _STEP


def _stages(task: Task) -> tuple[int, ...]:
    if task.stage is not None:
        return (task.stage,)
    return (0, 1, 2, 3) if task.framework == "deepspeed" else (0, 1)


def _recomputes(task: Task) -> tuple[Recompute, ...]:
    return RECOMPUTE if task.recompute is None else (task.recompute,)


def _tensor_sizes(task: Task) -> list[int]:
    shapes, cluster = task.shapes, task.cluster
    if task.tensor is not None:
        return [task.tensor]
    return [
        size
        for size in _divisors(cluster.node)
        if shapes.heads % size == 0 and shapes.kv_heads % size == 0 and cluster.ranks % size == 0
    ]


def _pipeline_sizes(task: Task, tensor: int) -> list[int]:
    if task.pipeline is not None:
        return [task.pipeline]
    if task.framework == "deepspeed":
        return [1]
    most = task.cluster.ranks // tensor
    return [size for size in _divisors(task.shapes.layers) if most % size == 0 and size <= 16]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def gib(nbytes: float) -> str:
    """Rounded for tables."""
    return f"{nbytes / _GIB:.1f} GiB"


def _why_not(task: Task, found: Judged) -> str:
    """Why it does not run."""
    memory = found.memory
    if memory is None:
        return found.reason
    states = memory.weights + memory.gradients + memory.optimizer + memory.moving
    return (
        f"does not fit by {gib(found.over)}: {gib(states)} of states, {gib(memory.kept)} kept, {gib(memory.moment)} in "
        f"{memory.peak}, of {gib(task.device_bytes)}"
    )


_PARTS = {
    "products": "products (recomputation and tiles included)",
    "attention": "attention",
    "exchange": "waiting for the other ranks of the sequence",
    "states": "waiting for weights and gradients",
    "tensor": "tensor parallelism's collectives",
    "copies": "waiting for host memory",
    "bubble": "the pipeline's bubble",
    "optimizer": "the optimizer",
}


def _why_lost(task: Task, winner: Judged, found: Judged) -> str:
    if not found.fits or found.time is None or winner.time is None:
        return _why_not(task, found)
    if task.length is None and found.length < winner.length:
        return f"{winner.length / found.length:.2f} times shorter"
    # By token, for alternatives differ in how many they train on at a time.
    scale, best = (1 / (each.rate * each.time.step) for each in (found, winner) if each.time is not None)
    more = {name: getattr(found.time, name) * scale - getattr(winner.time, name) * best for name in Time._fields}
    part = max(more, key=lambda name: more[name])
    slower = winner.rate / found.rate
    if slower < 1.01:
        return "about as fast, and less simple"
    share = more[part] / (1 / winner.rate)
    return f"{slower:.2f} times slower, most of it in {_PARTS[part]}: {share:+.0%} of the winner's step"
