"""The stage planner against brute force over every assignment of a dim to every stage."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsp_plugin import SequenceParallelConfigError
from dsp_plugin.layout import Layout, shard_sizes
from dsp_plugin.methods import METHODS, ulysses
from dsp_plugin.planner.moves import Activation, Border
from dsp_plugin.planner.stages import AttentionShape, Inside, StageSpec, attention_workload, plan_stages
from dsp_plugin.plans.pattern import Extra

HEADS = AttentionShape(heads=4, kv_heads=4, head_dim=8)
Score = tuple[int, int]


def all_to_all_bytes(sizes: dict[str, int], source: str, target: str, width: int, parts: int) -> int:
    """Of all ranks in one switch: every entry whose owner changes, counted one by one."""
    of_source, of_target = shard_sizes(sizes[source], parts), shard_sizes(sizes[target], parts)
    rest = prod(size for dim, size in sizes.items() if dim not in (source, target)) * width
    return rest * sum(of_source[a] * of_target[b] for a in range(parts) for b in range(parts) if a != b)


def score(act: Activation, stages: list[StageSpec], dims: tuple[str, ...], parts: int, gather: bool) -> Score | None:
    """(stages that leave a rank idle, bytes of all ranks forward and backward) of one assignment; None if illegal."""
    sizes, width = dict(act.sizes), act.features * act.element_size
    whole = (parts - 1) * act.nbytes
    nbytes = whole * (2 if gather else 1)  # split gathers gradients, gather gathers activations
    idle = 0
    for stage, dim in zip(stages, dims, strict=True):
        idle += sizes[dim] < parts
        if dim in stage.computes_along:
            if stage.attention is None or ulysses.illegal(attention_workload(act, stage, parts)):
                return None
            others = prod(sizes[along] for along in stage.computes_along if along != dim)
            workload = attention_workload(act, stage, parts)
            tokens = [others * local for local in shard_sizes(sizes[dim], parts)]
            nbytes += sum(sum(ulysses.wire_bytes_of_shard(workload, rank, tokens)) for rank in range(parts))
    for source, target in pairwise(dims):
        if source != target:
            nbytes += 2 * all_to_all_bytes(sizes, source, target, width, parts)
    return idle, nbytes


def brute_force(
    act: Activation, stages: list[StageSpec], parts: int, switching: bool, gather: bool
) -> dict[tuple[str, ...], Score]:
    found = {}
    for dims in product(act.shardable, repeat=len(stages)):
        if switching or len(set(dims)) == 1:
            result = score(act, stages, dims, parts, gather)
            if result is not None:
                found[dims] = result
    return found


dims_used = st.sampled_from([("s",), ("t",), ("h",), ("s", "t"), ("s", "t", "h"), ()])
stage_specs = st.lists(
    st.builds(
        StageSpec,
        name=st.sampled_from(["one", "two", "three"]),
        computes_along=dims_used,
        attention=st.sampled_from([None, HEADS, AttentionShape(6, 2, 8), AttentionShape(1, 1, 16)]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 7), st.integers(1, 9), st.integers(1, 5)),
    specs=stage_specs,
    parts=st.integers(1, 5),
    switching=st.booleans(),
    gather=st.booleans(),
    batch_dim=st.sampled_from(["b", "none"]),
)
def test_the_plan_is_the_best_of_all_assignments(sizes, specs, parts, switching, gather, batch_dim):
    act = Activation(dict(zip("btsh", sizes, strict=True)), features=8, element_size=4, batch_dim=batch_dim)
    found = brute_force(act, specs, parts, switching, gather)
    if not found:
        with pytest.raises(SequenceParallelConfigError, match=f"size={parts}"):
            plan_stages(act, specs, parts, switching=switching, gather=gather)
        return
    plan = plan_stages(act, specs, parts, switching=switching, gather=gather)
    chosen = tuple(row.sharded for row in plan.rows)
    assert chosen in found
    assert found[chosen] == min(found.values())
    assert plan.total == found[chosen][1]
    for index, row in enumerate(plan.rows):
        assert set(row.alternatives) == set(act.shardable)
        for dim, bytes_or_reason in row.alternatives.items():
            forced = [value for dims, value in found.items() if dims[index] == dim]
            if forced:
                assert bytes_or_reason == min(forced)[1], (row.stage, dim)
            else:
                assert isinstance(bytes_or_reason, str), (row.stage, dim)


SPACE, TIME = StageSpec("space", ("s",), HEADS), StageSpec("time", ("t",), HEADS)


def moves(plan) -> list[str]:
    return [row.move for row in plan.rows]


def test_space_and_time_blocks_switch_twice_per_layer_pair():
    act = Activation({"b": 2, "t": 8, "s": 16}, features=32, element_size=2)
    plan = plan_stages(act, [SPACE, TIME] * 3, 4)
    assert [row.sharded for row in plan.rows] == ["t", "s"] * 3
    assert moves(plan) == ["split t", *["switch t -> s", "switch s -> t"] * 2, "switch t -> s"]
    assert {row.inside for row in plan.rows} == {"local"}
    # The paper's price of a switch: (P-1)/P of the activation over P ranks, per rank, each way.
    per_switch = act.nbytes * 3 // 4 // 4
    assert [tuple(row.wire) for row in plan.rows[1:]] == [(per_switch, per_switch)] * 5
    assert plan.total == 4 * (5 * 2 * per_switch) + 2 * 3 * act.nbytes
    assert tuple(plan.leave) == (3 * act.nbytes // 4, 0)


def test_without_switching_one_dim_stays_sharded_and_ulysses_runs_inside():
    act = Activation({"b": 1, "t": 8, "s": 16}, features=32, element_size=2)
    plan = plan_stages(act, [SPACE, TIME] * 2, 4, switching=False)
    assert len({row.sharded for row in plan.rows}) == 1
    assert moves(plan)[1:] == ["keep"] * 3
    assert [row.inside for row in plan.rows].count("ulysses") == 2
    assert plan_stages(act, [SPACE, TIME] * 2, 4).total < plan.total


def test_axial_attention_over_three_dims_switches_only_where_it_must():
    act = Activation({"b": 1, "t": 8, "h": 8, "w": 8}, features=16, element_size=4)
    axial = [StageSpec(dim, (dim,), AttentionShape(2, 2, 8)) for dim in "thw"]
    plan = plan_stages(act, axial * 2, 4)
    assert all(row.sharded != row.stage for row in plan.rows)
    # Each dim is free for two stages in a row, so every second boundary needs no switch.
    assert sum(move.startswith("switch") for move in moves(plan)) == 2


def test_joint_attention_over_all_dims_runs_ulysses_inside_and_is_priced():
    act = Activation({"b": 2, "t": 4, "s": 8}, features=32, element_size=2)
    joint = StageSpec("joint", ("t", "s"), HEADS)
    plan = plan_stages(act, [SPACE, joint, TIME], 4)
    row = plan.rows[1]
    assert row.inside == "ulysses"
    workload = attention_workload(act, joint, 4)
    assert (workload.length, workload.batch) == (32, 2)
    one_rank = ulysses.wire_bytes(workload, 0)
    priced_alone = plan_stages(act, [joint], 4, gather=False).rows[0].wire
    assert priced_alone.forward == one_rank.forward
    assert priced_alone.backward == one_rank.backward + 3 * act.nbytes // 4
    assert Layout("contiguous", 32, 4).sizes == (8,) * 4


def test_a_dim_shorter_than_the_group_is_avoided_even_where_it_costs_fewer_bytes():
    act = Activation({"b": 1, "t": 2, "s": 64}, features=8, element_size=4)
    # Sharding t costs nothing here, but leaves two of four ranks without work; Ulysses over s keeps all busy.
    plan = plan_stages(act, [SPACE], 4)
    assert plan.rows[0].sharded == "s"
    assert plan.rows[0].inside == "ulysses"
    # Where nothing else is legal, the short dim is used.
    assert plan_stages(act, [StageSpec("conv", ("s",))], 4).rows[0].sharded == "t"


@pytest.mark.parametrize(
    ("stage", "parts", "reason", "remedy"),
    [
        (StageSpec("joint", ("t", "s")), 2, "names no attention", "Name the stage's attention modules"),
        (StageSpec("joint", ("t", "s"), AttentionShape(2, 2, 8)), 4, "heads=2 < ulysses_size=4", "Choose a size that"),
        (
            StageSpec("joint", ("t", "s"), AttentionShape(2, 2, 8), (Extra(("b", "c"), 3),)),
            2,
            "attend to them P times",
            "Let one name stand for all tokens",
        ),
    ],
)
def test_no_free_dim_is_refused_with_the_reason_for_every_dim(stage, parts, reason, remedy):
    act = Activation({"b": 1, "t": 8, "s": 8}, features=16, element_size=4)
    with pytest.raises(SequenceParallelConfigError, match="no dim can be sharded") as refused:
        plan_stages(act, [SPACE, stage], parts)
    message = str(refused.value)
    assert f"plan='{stage.name}'" in message
    assert f"size={parts}" in message
    assert "t: " in message
    assert "s: " in message
    assert message.count(reason) == 2
    assert remedy in message


def test_no_single_dim_for_all_stages_says_who_blocks_which():
    act = Activation({"b": 1, "t": 8, "s": 8}, features=16, element_size=4)
    conv_space, conv_time = StageSpec("conv over s", ("s",)), StageSpec("conv over t", ("t",))
    with pytest.raises(SequenceParallelConfigError, match="no single dim") as refused:
        plan_stages(act, [conv_space, conv_time], 2, switching=False)
    assert "s by conv over s" in str(refused.value)
    assert "t by conv over t" in str(refused.value)
    assert "Use method dsp" in str(refused.value)
    assert plan_stages(act, [conv_space, conv_time], 2).rows[1].sharded == "s"


def test_one_rank_costs_nothing():
    act = Activation({"b": 1, "t": 3, "s": 5}, features=16, element_size=4)
    plan = plan_stages(act, [SPACE, TIME], 1)
    assert plan.total == 0
    assert all(tuple(row.wire) == (0, 0) for row in plan.rows)


def test_stages_return_to_the_dim_that_the_code_between_them_needs_and_class_tokens_are_priced():
    """Timesformer's shape: a class token per sequence, repeated per frame inside the space attention."""
    act = Activation({"b": 2, "t": 3, "s": 5}, features=4, element_size=4)
    time = StageSpec("time", ("t",))
    space = StageSpec("space", ("s",), extras=(Extra(("b", "t", "c"), 1),))
    border = Border(16, (Extra(("b", "c"), 1),))
    plan = plan_stages(act, [time, space], 2, between="s", enter=border, leave=border)
    assert [(row.sharded, row.move) for row in plan.rows] == [("s", "keep"), ("t", "switch s -> t and back")]
    # s is 3 + 2, t is 2 + 1; a token has 16 bytes and the batch is 2.
    crossing = 2 * 16 * (3 * 1 + 2 * 2)
    assert crossing == 2 * 16 * (2 * 2 + 1 * 3)
    class_tokens = 2 * 16 * 3
    whole = act.nbytes
    assert plan.total == whole + (4 * crossing + 2 * class_tokens) + whole
    assert plan.enter == (0, 2 * 3 * 3 * 16)
    assert plan.leave == (2 * 3 * 3 * 16, 0)
    # On rank 0: its rows of s to rank 1's t, and back; its gathered class tokens, and their split's gradient.
    forward = 2 * 16 * (3 * 1) + 2 * 16 * (2 * 2) + 2 * 16 * 2
    assert plan.rows[1].wire == (forward, forward)
    without_gradient = plan_stages(act, [time, space], 2, between="s", enter=Border(16, backward=False), leave=border)
    assert without_gradient.total == plan.total - whole


def test_a_batch_that_may_be_sharded_serves_stages_that_compute_along_everything_else():
    tied = StageSpec("row", ("r", "c"))
    column = StageSpec("column", ("r",))
    sizes = {"r": 4, "c": 6, "b": 4}
    with pytest.raises(SequenceParallelConfigError, match="no dim can be sharded") as refused:
        plan_stages(Activation(sizes, 8, 4), [tied, column], 2)
    assert "batch_dim" in str(refused.value)
    plan = plan_stages(Activation(sizes, 8, 4, batch_dim=None), [tied, column, tied], 2)
    assert [row.sharded for row in plan.rows] == ["b", "b", "b"]


@pytest.mark.parametrize("method", ["ulysses", "ring", "usp"])
def test_attention_inside_a_stage_is_priced_by_its_method(method):
    act = Activation({"b": 2, "l": 10}, features=32, element_size=4)
    joint = StageSpec("joint", ("l",), HEADS)
    inside = Inside(method, ulysses_size=2 if method == "usp" else None)
    plan = plan_stages(act, [joint], 4, switching=False, inside=inside)
    assert plan.rows[0].inside == method
    workload = replace(attention_workload(act, joint, 4), ulysses_size=inside.ulysses_size)
    expected = sum(sum(METHODS[method].wire_bytes(workload, rank)) for rank in range(4))
    assert plan.total == expected + 2 * 3 * act.nbytes


def test_further_tokens_that_every_rank_holds_keep_attention_out_of_a_stage():
    act = Activation({"b": 1, "s": 8}, features=32, element_size=4)
    with pytest.raises(SequenceParallelConfigError, match="attend to them P times"):
        plan_stages(act, [StageSpec("joint", ("s",), HEADS, (Extra(("b",), 1),))], 2)
