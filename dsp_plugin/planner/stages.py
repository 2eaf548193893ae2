"""DSP's planner: which dim to shard in every stage, as a shortest path over dims (arXiv 2403.10266, section 3.3).

A stage is free to run with a dim sharded that it does not compute along. A stage that computes along the sharded dim
needs an attention method inside (Ulysses, a ring, or both), and pays for it. Moving the sharding between stages costs a
switch. The path with the fewest bytes, forward and backward, wins; one that leaves ranks without work loses to one that
does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, NamedTuple

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.layout import shard_sizes
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.method import WireBytes, Workload
from dsp_plugin.planner.moves import Activation, Border, Shard, added, move, none_sent
from dsp_plugin.plans.pattern import Extra


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
        extras: tokens of another kind in its layout, which move with the others.
    """

    name: str
    computes_along: tuple[str, ...]
    attention: AttentionShape | None = None
    extras: tuple[Extra, ...] = ()


@dataclass(frozen=True)
class Inside:
    """What serves a stage that computes along the sharded dim.

    Attributes:
        method: of `METHODS`, for softmax attention.
        ulysses_size: for usp, U of P = U * R.
        ring_gradient_dtype: as in the config.
    """

    method: str = "ulysses"
    ulysses_size: int | None = None
    ring_gradient_dtype: Literal["fp32", "input"] = "fp32"


_ULYSSES = Inside()


class StageRow(NamedTuple):
    """One stage of a plan.

    Attributes:
        stage: its name.
        sharded: the dim that is sharded while it runs.
        move: ``split``, ``keep`` or ``switch a -> b``, with ``and back`` where it leaves tokens as it found them: what
            happens around it.
        inside: ``local``, or the method that serves it when it computes along the sharded dim.
        wire: bytes leaving the busiest rank for the moves and what happens inside.
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
    """The chosen dims.

    Attributes:
        rows: by stage.
        leave: bytes leaving the busiest rank when tokens are made whole again after the last stage.
        total: bytes sent by all ranks, forward and backward, all moves included.
        enter: bytes leaving the busiest rank when tokens are split, where no stage does it.
    """

    rows: tuple[StageRow, ...]
    leave: WireBytes
    total: int
    enter: WireBytes


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
    activation: Activation,
    stages: Sequence[StageSpec],
    size: int,
    *,
    switching: bool = True,
    gather: bool = True,
    between: str | None = None,
    enter: Border | None = None,
    leave: Border | None = None,
    inside: Inside = _ULYSSES,
    entry_gradient: bool = True,
) -> StagePlan:
    """Choose the sharded dim of every stage.

    Args:
        activation: what stages hand on; the first stage gets it whole on every rank.
        stages: in order of execution.
        size: P.
        switching: False keeps one dim sharded throughout (attention inside, on one sharded dim).
        gather: whether the last stage's output is made whole again.
        between: the dim that has to be sharded outside of stages, if only one can be.
        enter: what is split before the first stage, in a module around it; None when the first stage's input is.
        leave: what is gathered after the last stage, likewise.
        inside: what serves stages that compute along the sharded dim.
        entry_gradient: whether the first stage's input needs a gradient.

    Raises:
        SequenceParallelConfigError: some stage can run with no dim sharded; the message says why for each dim.
    """
    assert stages
    dims = activation.shardable
    # Layers repeat: what is alike is priced once, which counts at hundreds of ranks.
    kinds = {replace(stage, name="") for stage in stages}
    priced = {kind: {dim: _inside(activation, kind, dim, size, inside) for dim in dims} for kind in kinds}
    choices_of = [priced[replace(stage, name="")] for stage in stages]
    for stage, choices in zip(stages, choices_of, strict=True):
        if all(isinstance(choice, str) for choice in choices.values()):
            raise SequenceParallelConfigError(
                setting="plan",
                value=stage.name,
                why=f"with size={size} no dim can be sharded in this stage: "
                + "; ".join(f"{dim}: {reason}" for dim, reason in choices.items()),
                remedy=f"{_way_out(stage, inside)}, set batch_dim to None if the batch may be sharded, or lower size",
            )
    ways = _Ways(activation, stages, size, switching, gather, between, enter, leave, entry_gradient)
    costs = [
        {dim: _cost(wire, activation.sizes[dim] < size) for dim, wire in choices.items() if not isinstance(wire, str)}
        for choices in choices_of
    ]
    starts = {dim: _cost(added(*ways.first(dim))) for dim in dims if ways.may_start(dim)}
    ends = {dim: _cost(added(*ways.last(dim))) for dim in dims if ways.may_end(dim)}
    moves = [
        {(a, b): _cost(added(*ways.across(index, a, b))) for a in dims for b in dims if ways.may_follow(a, b)}
        for index in range(1, len(stages))
    ]
    arrive = _sweep(costs, moves, starts)
    backwards = [{(b, a): cost for (a, b), cost in step.items()} for step in moves[::-1]]
    remain = _sweep(costs[::-1], backwards, ends)[::-1]

    chosen: list[str] = []
    for index in range(len(stages)):
        if index == 0:
            ahead = {dim: starts[dim].plus(cost) for dim, cost in remain[0].items() if dim in starts}
        else:
            step = moves[index - 1]
            ahead = {
                dim: step[chosen[-1], dim].plus(cost)
                for dim, cost in remain[index].items()
                if (chosen[-1], dim) in step
            }
        if not ahead:
            raise _no_single_dim(stages, choices_of, size)
        chosen.append(min(ahead, key=lambda dim: ahead[dim]))
    rows = tuple(
        StageRow(
            stage.name,
            dim,
            ways.name(index, chosen),
            inside.method if dim in stage.computes_along else "local",
            _busiest(added(*ways.around(index, chosen), _local(choices_of[index][dim]))),
            {
                other: choice
                if isinstance(choice, str)
                else arrive[index][other].plus(remain[index][other]).minus(costs[index][other]).nbytes
                if other in arrive[index] and other in remain[index]
                else "no other stage can keep it"
                for other, choice in choices_of[index].items()
            },
        )
        for index, (stage, dim) in enumerate(zip(stages, chosen, strict=True))
    )
    total = starts[chosen[0]].plus(remain[0][chosen[0]]).nbytes
    return StagePlan(rows, _busiest(ways.leaving(chosen[-1])), total, _busiest(ways.entering(chosen[0])))


class _Ways:
    """What moves between stages, by the dims sharded in them."""

    def __init__(
        self,
        activation: Activation,
        stages: Sequence[StageSpec],
        size: int,
        switching: bool,
        gather: bool,
        between: str | None,
        enter: Border | None,
        leave: Border | None,
        entry_gradient: bool,
    ) -> None:
        self._entry_gradient = entry_gradient
        self._activation, self._stages, self._size = activation, stages, size
        self._switching, self._gather, self._between = switching, gather, between
        self._enter, self._leave = enter, leave
        self._priced: dict[tuple[tuple[Extra, ...], str | None, str | None], Sequence[WireBytes]] = {}

    def may_start(self, dim: str) -> bool:
        return self._switching or self._between in (None, dim)

    def may_end(self, dim: str) -> bool:
        return self.may_start(dim) and (self._leave is None or self._leave.has(self._between or dim))

    def may_follow(self, source: str, target: str) -> bool:
        return self._switching or source == target

    def entering(self, dim: str) -> Sequence[WireBytes]:
        """The split before the first stage, of the whole path."""
        if self._enter is None:
            return none_sent(self._size)
        return move(self._enter.of(self._activation), self._enter.extras, None, self._between or dim, self._size)

    def leaving(self, dim: str) -> Sequence[WireBytes]:
        """The gather after the last stage."""
        if not self._gather:
            return none_sent(self._size)
        if self._leave is None:
            return self._at(-1, dim, None)
        return move(self._leave.of(self._activation), self._leave.extras, self._between or dim, None, self._size)

    def first(self, dim: str) -> list[Sequence[WireBytes]]:
        return [self.entering(dim), self._before(0, None, dim)]

    def last(self, dim: str) -> list[Sequence[WireBytes]]:
        return [self._after(len(self._stages) - 1, dim), self.leaving(dim)]

    def across(self, index: int, source: str, target: str) -> list[Sequence[WireBytes]]:
        """From stage ``index - 1`` into stage ``index``."""
        return [self._after(index - 1, source), self._before(index, source, target)]

    def around(self, index: int, chosen: Sequence[str]) -> list[Sequence[WireBytes]]:
        """What one stage of a path pays for."""
        before = chosen[index - 1] if index else None
        return [self._before(index, before, chosen[index]), self._after(index, chosen[index])]

    def name(self, index: int, chosen: Sequence[str]) -> str:
        """What happens around a stage, in words."""
        dim = chosen[index]
        source = self._found(index, chosen[index - 1] if index else None)
        moved = f"split {dim}" if source is None else f"switch {source} -> {dim}"
        text = "keep" if source == dim else moved
        return f"{text} and back" if self._returns(index, dim) else text

    def _found(self, index: int, before: str | None) -> str | None:
        """Where the tokens are sharded when they reach a stage."""
        if index == 0:
            return None if self._enter is None else self._between
        return self._between or before

    def _returns(self, index: int, dim: str) -> bool:
        last = index == len(self._stages) - 1 and self._leave is None
        return self._between is not None and dim != self._between and not last

    def _before(self, index: int, before: str | None, dim: str) -> Sequence[WireBytes]:
        if index == 0 and self._enter is not None and self._between is None:
            return none_sent(self._size)
        return self._at(index, self._found(index, before), dim)

    def _after(self, index: int, dim: str) -> Sequence[WireBytes]:
        return self._at(index, dim, self._between) if self._returns(index, dim) else none_sent(self._size)

    def _at(self, index: int, source: str | None, target: str | None) -> Sequence[WireBytes]:
        if source == target:
            return none_sent(self._size)
        key = (self._stages[index].extras, source, target)
        if key not in self._priced:
            token_bytes = self._activation.features * self._activation.element_size
            whole = Shard(self._activation.sizes, token_bytes, source is not None or self._entry_gradient)
            self._priced[key] = move(whole, key[0], source, target, self._size)
        return self._priced[key]


def _sweep(costs: list[_Costs], moves: Sequence[Mapping[tuple[str, str], _Cost]], start: _Costs) -> list[_Costs]:
    """For every stage and dim the least cost from the start up to and including that stage."""
    best: list[_Costs] = [{dim: start[dim].plus(cost) for dim, cost in costs[0].items() if dim in start}]
    for stage, step in zip(costs[1:], moves, strict=True):
        reached: _Costs = {}
        for dim, cost in stage.items():
            ways = [before.plus(step[source, dim]) for source, before in best[-1].items() if (source, dim) in step]
            if ways:
                reached[dim] = min(ways).plus(cost)
        best.append(reached)
    return best


def _inside(activation: Activation, stage: StageSpec, dim: str, size: int, inside: Inside) -> list[WireBytes] | str:
    """What runs inside the stage with ``dim`` sharded: bytes by rank, or why it cannot run."""
    if dim not in stage.computes_along:
        return none_sent(size)
    if stage.attention is None:
        return f"the stage computes along {dim} and names no attention that {inside.method.capitalize()} could serve"
    if any(extra.count and dim not in extra.names for extra in stage.extras):
        return f"every rank would hold the stage's further tokens beside its part of {dim}, and attend to them P times"
    others = prod(activation.sizes[along] for along in stage.computes_along if along != dim)
    tokens = tuple(others * local for local in shard_sizes(activation.sizes[dim], size))
    workload = replace(
        attention_workload(activation, stage, size),
        ulysses_size=inside.ulysses_size if inside.method == "usp" else None,
        ring_gradient_dtype=inside.ring_gradient_dtype,
        sizes=tokens,
    )
    method = METHODS[inside.method]
    reasons = method.illegal(workload)
    if reasons:
        return " ".join(reasons)
    return [method.wire_bytes(workload, rank) for rank in range(size)]


def _way_out(stage: StageSpec, inside: Inside) -> str:
    if stage.attention is None:
        return f"name the stage's attention modules so that {inside.method.capitalize()} can run inside"
    if any(extra.count for extra in stage.extras):
        return 'let one name stand for all tokens that attend to each other, further ones too (tokens="b n c")'
    return "choose a size that the attention can be shared by"


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


def _cost(wire: Sequence[WireBytes], idle: bool = False) -> _Cost:
    return _Cost(int(idle), sum(rank.forward + rank.backward for rank in wire))


def _local(choice: list[WireBytes] | str) -> list[WireBytes]:
    assert not isinstance(choice, str)
    return choice


def _busiest(ranks: Sequence[WireBytes]) -> WireBytes:
    return max(ranks, key=lambda wire: wire.forward + wire.backward)


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
