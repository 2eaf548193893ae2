"""DSP's planner: which dim to shard in every stage, as a shortest path over dims (arXiv 2403.10266, section 3.3).

A stage is free to run with a dim sharded that it does not compute along. A stage that computes along the sharded dim
needs Ulysses inside, and pays for it. Moving the sharding between stages costs a switch. The path with the fewest
bytes, forward and backward, wins; one that leaves ranks without work loses to one that does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.layout import shard_sizes
from dsp_plugin.methods import ulysses
from dsp_plugin.methods.dsp import switch_bytes
from dsp_plugin.methods.method import WireBytes, Workload


class AttentionShape(NamedTuple):
    """Heads of a stage's attention, which Ulysses inside it would scatter."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class StageSpec:
    """One stage as the planner sees it.

    Attributes:
        name: for the table.
        computes_along: the dims it mixes tokens along.
        attention: set when the stage mixes tokens by attention alone, so that Ulysses can serve it.
    """

    name: str
    computes_along: tuple[str, ...]
    attention: AttentionShape | None = None


@dataclass(frozen=True)
class Activation:
    """The activation that stages hand on.

    Attributes:
        sizes: length of every token dim by name, in memory order. All but the batch may be sharded.
        features: elements per token.
        element_size: bytes per element.
        batch_dim: the dim that data parallelism shards.
    """

    sizes: Mapping[str, int]
    features: int
    element_size: int
    batch_dim: str = "b"

    @property
    def shardable(self) -> tuple[str, ...]:
        """The dims that sequence parallelism may shard."""
        return tuple(dim for dim in self.sizes if dim != self.batch_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole activation."""
        return prod(self.sizes.values()) * self.features * self.element_size


class StageRow(NamedTuple):
    """One stage of a plan.

    Attributes:
        stage: its name.
        sharded: the dim that is sharded while it runs.
        move: ``split``, ``keep`` or ``switch a -> b``: what happens before it.
        inside: ``local``, or ``ulysses`` when it computes along the sharded dim.
        wire: bytes leaving the busiest rank for the move and what happens inside.
        alternatives: for every dim, the bytes of the best whole plan that shards it here (all ranks, forward and
            backward), or why it cannot be.
    """

    stage: str
    sharded: str
    move: str
    inside: str
    wire: WireBytes
    alternatives: Mapping[str, int | str]


@dataclass(frozen=True)
class StagePlan:
    """The chosen dims. ``total`` is bytes sent by all ranks, forward and backward, the final gather included."""

    rows: tuple[StageRow, ...]
    leave: WireBytes
    total: int


class _Cost(NamedTuple):
    """Compared in this order: stages that leave a rank idle, then bytes."""

    idle: int
    nbytes: int

    def plus(self, other: _Cost) -> _Cost:
        return _Cost(self.idle + other.idle, self.nbytes + other.nbytes)

    def minus(self, other: _Cost) -> _Cost:
        return _Cost(self.idle - other.idle, self.nbytes - other.nbytes)


_Costs = dict[str, _Cost]


def plan_stages(
    activation: Activation, stages: Sequence[StageSpec], size: int, *, switching: bool = True, gather: bool = True
) -> StagePlan:
    """Choose the sharded dim of every stage.

    Args:
        activation: what stages hand on; the first stage gets it whole on every rank.
        stages: in order of execution.
        size: P.
        switching: False keeps one dim sharded throughout (Ulysses on one sharded dim).
        gather: whether the last stage's output is made whole again.

    Raises:
        SequenceParallelConfigError: some stage can run with no dim sharded; the message says why for each dim.
    """
    assert stages
    dims = activation.shardable
    inside = [{dim: _inside(activation, stage, dim, size) for dim in dims} for stage in stages]
    for stage, choices in zip(stages, inside, strict=True):
        if all(isinstance(choice, str) for choice in choices.values()):
            raise SequenceParallelConfigError(
                setting="plan",
                value=stage.name,
                why=f"with size={size} no dim can be sharded in this stage: "
                + "; ".join(f"{dim}: {reason}" for dim, reason in choices.items()),
                remedy="name the stage's attention modules so that Ulysses can run inside, or lower size",
            )
    costs = [
        {dim: _cost(wire, activation.sizes[dim] < size) for dim, wire in choices.items() if not isinstance(wire, str)}
        for choices in inside
    ]
    moves = {(a, b): _cost(_switch(activation, a, b, size)) for a in dims for b in dims if a == b or switching}
    enter = {dim: _cost(_enter(activation, dim, size)) for dim in dims}
    leave = {dim: _cost(_leave(activation, dim, size)) if gather else _Cost(0, 0) for dim in dims}
    arrive = _sweep(costs, moves, enter)
    remain = _sweep(costs[::-1], {(b, a): cost for (a, b), cost in moves.items()}, leave)[::-1]

    chosen: list[str] = []
    for index in range(len(stages)):
        ahead = {
            dim: cost if index == 0 else moves[chosen[-1], dim].plus(cost)
            for dim, cost in remain[index].items()
            if index == 0 or (chosen[-1], dim) in moves
        }
        if index == 0:
            ahead = {dim: cost.plus(enter[dim]) for dim, cost in ahead.items()}
        if not ahead:
            raise _no_single_dim(stages, inside, size)
        chosen.append(min(ahead, key=lambda dim: ahead[dim]))
    rows = tuple(
        StageRow(
            stage.name,
            dim,
            _move_name(chosen[index - 1] if index else None, dim),
            "ulysses" if dim in stage.computes_along else "local",
            _busiest(
                _enter(activation, dim, size) if index == 0 else _switch(activation, chosen[index - 1], dim, size),
                _local(inside[index][dim]),
            ),
            {
                other: choice
                if isinstance(choice, str)
                else arrive[index][other].plus(remain[index][other]).minus(costs[index][other]).nbytes
                if other in arrive[index] and other in remain[index]
                else "no other stage can keep it"
                for other, choice in inside[index].items()
            },
        )
        for index, (stage, dim) in enumerate(zip(stages, chosen, strict=True))
    )
    first = chosen[0]
    leaving = _leave(activation, chosen[-1], size) if gather else [WireBytes(0, 0)] * size
    return StagePlan(rows, _busiest(leaving), enter[first].plus(remain[0][first]).nbytes)


def _sweep(costs: list[_Costs], moves: Mapping[tuple[str, str], _Cost], start: _Costs) -> list[_Costs]:
    """For every stage and dim the least cost from the start up to and including that stage."""
    best: list[_Costs] = [{dim: start[dim].plus(cost) for dim, cost in costs[0].items()}]
    for stage in costs[1:]:
        reached: _Costs = {}
        for dim, cost in stage.items():
            ways = [before.plus(moves[source, dim]) for source, before in best[-1].items() if (source, dim) in moves]
            if ways:
                reached[dim] = min(ways).plus(cost)
        best.append(reached)
    return best


def _inside(activation: Activation, stage: StageSpec, dim: str, size: int) -> list[WireBytes] | str:
    """What runs inside the stage with ``dim`` sharded: bytes by rank, or why it cannot run."""
    if dim not in stage.computes_along:
        return [WireBytes(0, 0)] * size
    if stage.attention is None:
        return f"the stage computes along {dim} and names no attention that Ulysses could serve"
    workload = attention_workload(activation, stage, size)
    reasons = ulysses.illegal(workload)
    if reasons:
        return " ".join(reasons)
    others = prod(activation.sizes[along] for along in stage.computes_along if along != dim)
    tokens = [others * local for local in shard_sizes(activation.sizes[dim], size)]
    return [ulysses.wire_bytes_of_shard(workload, rank, tokens) for rank in range(size)]


def attention_workload(activation: Activation, stage: StageSpec, size: int) -> Workload:
    """The attention call of a stage: what it does not compute along is batch."""
    assert stage.attention is not None
    length = prod(activation.sizes[dim] for dim in stage.computes_along)
    return Workload(
        size=size,
        heads=stage.attention.heads,
        kv_heads=stage.attention.kv_heads,
        head_dim=stage.attention.head_dim,
        length=length,
        batch=prod(activation.sizes.values()) // length,
        element_size=activation.element_size,
    )


def _switch(activation: Activation, source: str, target: str, size: int) -> list[WireBytes]:
    if source == target:
        return [WireBytes(0, 0)] * size
    names = list(activation.sizes)
    shape = (*activation.sizes.values(), activation.features)
    return [
        switch_bytes(
            shape,
            names.index(source),
            names.index(target),
            size=size,
            rank=rank,
            element_size=activation.element_size,
        )
        for rank in range(size)
    ]


def _shards(activation: Activation, dim: str, size: int) -> list[int]:
    per_entry = activation.nbytes // activation.sizes[dim]
    return [per_entry * local * (size - 1) for local in shard_sizes(activation.sizes[dim], size)]


def _enter(activation: Activation, dim: str, size: int) -> list[WireBytes]:
    """`split` sends nothing forward and gathers the gradient backward."""
    return [WireBytes(0, sent) for sent in _shards(activation, dim, size)]


def _leave(activation: Activation, dim: str, size: int) -> list[WireBytes]:
    """`gather` gathers forward and slices the gradient backward."""
    return [WireBytes(sent, 0) for sent in _shards(activation, dim, size)]


def _cost(wire: Sequence[WireBytes], idle: bool = False) -> _Cost:
    return _Cost(int(idle), sum(rank.forward + rank.backward for rank in wire))


def _local(choice: list[WireBytes] | str) -> list[WireBytes]:
    assert not isinstance(choice, str)
    return choice


def _busiest(*parts: Sequence[WireBytes]) -> WireBytes:
    totals = [
        WireBytes(sum(part.forward for part in rank), sum(part.backward for part in rank))
        for rank in zip(*parts, strict=True)
    ]
    return max(totals, key=lambda wire: wire.forward + wire.backward)


def _move_name(source: str | None, target: str) -> str:
    if source is None:
        return f"split {target}"
    return "keep" if source == target else f"switch {source} -> {target}"


def _no_single_dim(
    stages: Sequence[StageSpec], inside: Sequence[Mapping[str, list[WireBytes] | str]], size: int
) -> SequenceParallelConfigError:
    blocked = {
        f"{dim} by {stage.name} ({reason})"
        for stage, choices in zip(stages, inside, strict=True)
        for dim, reason in choices.items()
        if isinstance(reason, str)
    }
    return SequenceParallelConfigError(
        setting="plan",
        why=f"no single dim can stay sharded through all stages with size={size}: {'; '.join(sorted(blocked))}",
        remedy="use method dsp, which switches dims between stages",
    )
