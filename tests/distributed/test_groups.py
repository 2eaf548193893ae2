"""The rank grid: which ranks share which axis, for every size of world, sequence, Ulysses and ring."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsp_plugin import Axis, SequenceParallelConfig, SequenceParallelConfigError, SequenceParallelGroups
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(60)]

WORLD = 4


def grid_config(ulysses: int, ring: int, order: str) -> Any:
    """What `build` reads of a config, for any grid."""
    size = ulysses * ring
    plain = SequenceParallelConfig(method="ulysses", size=size)
    return SimpleNamespace(
        size=size,
        ulysses_size=ulysses,
        ring_size=ring,
        ulysses_order=order,
        debug=False,
        check_world=plain.check_world,
    )


def expected_ranks(rank: int, ulysses: int, ring: int, order: str = "adjacent") -> dict[str, tuple[int, ...]]:
    """From the definition: sequence groups are runs of U*R ranks; inside one axis is runs, the other strides."""
    size = ulysses * ring
    first = rank - rank % size
    place = rank - first
    inner, outer = (ulysses, ring) if order == "adjacent" else (ring, ulysses)
    run = tuple(first + place - place % inner + i for i in range(inner))
    stride = tuple(first + place % inner + o * inner for o in range(outer))
    return {
        "sp": tuple(range(first, first + size)),
        "ulysses": run if order == "adjacent" else stride,
        "ring": stride if order == "adjacent" else run,
        "dsp": tuple(range(first, first + size)),
        "lasp": tuple(range(first, first + size)),
        "dp": tuple(range(place, WORLD, size)),
    }


def _sum_over(axis: Axis) -> int:
    total = torch.tensor([dist.get_rank()])
    if axis.group is not None:
        dist.all_reduce(total, group=axis.group)
    return int(total)


def _check_grids(grids: list[tuple[int, int]]) -> None:
    rank = dist.get_rank()
    for (ulysses, ring), order in product(grids, ("adjacent", "strided")):
        groups = SequenceParallelGroups.build(grid_config(ulysses, ring, order))
        expected = expected_ranks(rank, ulysses, ring, order)
        assert {axis.name: axis.ranks for axis in groups} == expected, (ulysses, ring, order)
        for axis in groups:
            assert axis.ranks[axis.rank] == rank
            assert axis.size == len(axis.ranks)
            assert (axis.group is None) == (axis.size == 1)
            assert not axis.debug
            if axis.group is not None:
                assert tuple(dist.get_process_group_ranks(axis.group)) == axis.ranks
            # The group is one that works, and reaches exactly these ranks.
            assert _sum_over(axis) == sum(axis.ranks)
        # Axes over the same ranks share a communicator.
        assert groups.dsp.group is groups.lasp.group is groups.sp.group
        if ring == 1:
            assert groups.ulysses.group is groups.sp.group
        if ulysses == 1 and ring > 1:
            assert groups.ring.group is groups.sp.group

    for size in (1, 2, 4):
        for method in ("ulysses", "dsp"):
            groups = SequenceParallelGroups.build(SequenceParallelConfig(method=method, size=size, debug=True))
            assert {axis.name: axis.ranks for axis in groups} == expected_ranks(rank, size, 1)
            assert all(axis.debug for axis in groups)


def test_every_grid_of_four_ranks():
    spawn(_check_grids, WORLD, [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2)])


def _check_existing() -> None:
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    strided = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    # Megatron-core may stride its context-parallel groups over the world.
    sp = Axis.of_group("sp", strided[rank % 2])
    assert (sp.ranks, sp.rank, sp.size) == ((rank % 2, rank % 2 + 2), rank // 2, 2)
    dp = Axis.of_group("dp", pairs[rank // 2])
    groups = SequenceParallelGroups.from_axes(sp=sp, ulysses=sp, ring=Axis.alone("ring", rank), dp=dp)
    assert [axis.name for axis in groups] == ["sp", "ulysses", "ring", "dsp", "lasp", "dp"]
    assert groups.ulysses.group is sp.group
    assert groups.dp.ranks == dp.ranks
    assert _sum_over(groups.ulysses) == sum(sp.ranks)

    of_group = SequenceParallelGroups.of_sequence_group(strided[rank % 2], debug=True)
    assert of_group.ulysses.ranks == sp.ranks
    assert of_group.dp.ranks == (rank,)
    assert of_group.sp.debug

    single = SequenceParallelGroups.single()
    assert all((axis.size, axis.ranks, axis.group) == (1, (rank,), None) for axis in single)

    wrong = SequenceParallelConfig(method="ulysses", size=3)
    with pytest.raises(SequenceParallelConfigError, match="size = 3 = 3 does not divide the 4 ranks") as refused:
        SequenceParallelGroups.build(wrong)
    assert "choose sizes" in str(refused.value).lower()
    # A grid that disagrees with itself is a defect of the integration, not the user's.
    with pytest.raises(AssertionError):
        SequenceParallelGroups.from_axes(sp=sp, ulysses=sp, ring=sp, dp=dp)


def test_groups_over_existing_process_groups_and_refusals():
    spawn(_check_existing, WORLD)


def _groups_made() -> dict[str, list[tuple[int, ...]]]:
    made: list[tuple[int, ...]] = []
    upstream = dist.new_group

    def counting(ranks: list[int], **settings: Any) -> Any:
        made.append(tuple(ranks))
        return upstream(ranks, **settings)

    dist.new_group = counting
    found = {}
    try:
        for name, size in (("two replicas", 2), ("one sequence", 4), ("replicas of one rank", 1)):
            groups = SequenceParallelGroups.build(SequenceParallelConfig(method="ulysses", size=size))
            found[name] = list(made)
            made.clear()
        assert groups.dp.group is dist.group.WORLD
        replicas = SequenceParallelGroups.build(SequenceParallelConfig(method="ulysses", size=2)).dp
        assert replicas.renamed("other").group is replicas.group
        found["asked for"] = list(made)
    finally:
        dist.new_group = upstream
    return found


def test_replicas_have_a_communicator_only_where_somebody_asks_for_it() -> None:
    for found in spawn(_groups_made, WORLD):
        assert found == {
            "two replicas": [(0, 1), (2, 3)],
            "one sequence": [(0, 1, 2, 3)],
            "replicas of one rank": [],
            "asked for": [(0, 2), (1, 3)],
        }


def _timeouts() -> list[float]:
    groups = SequenceParallelGroups.build(grid_config(2, 2, "adjacent"))
    made = [axis.group for axis in groups if axis.group is not None]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in made]


def test_groups_wait_as_long_as_the_script_lets_the_world_wait():
    """`spawn` gives the world 30 s more than itself; torch gives new groups half an hour."""
    for timeouts in spawn(_timeouts, WORLD, timeout=25.0):
        assert timeouts == [55.0] * 5


def test_groups_of_a_world_on_paper_need_no_timeout():
    """As in a dry run, whose backend has no options to read one from."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        groups = SequenceParallelGroups.build(grid_config(2, 2, "adjacent"))
    finally:
        dist.destroy_process_group()
    assert groups.sp.ranks == (0, 1, 2, 3)


def test_debug_by_environment(monkeypatch):
    monkeypatch.setenv("DSP_PLUGIN_DEBUG", "1")
    assert all(axis.debug for axis in SequenceParallelGroups.single())
    monkeypatch.setenv("DSP_PLUGIN_DEBUG", "0")
    assert not any(axis.debug for axis in SequenceParallelGroups.single())


def test_one_process_without_torch_distributed():
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method="ulysses", size=1))
    assert all(axis.size == 1 for axis in groups)
    with pytest.raises(SequenceParallelConfigError, match=r"size = 2 = 2 does not divide the 1 ranks"):
        SequenceParallelGroups.build(SequenceParallelConfig(method="ulysses", size=2))
