"""The matcher finds each fault in records made by hand, and none where there is none."""

from __future__ import annotations

from itertools import count

import pytest

from dsp_plugin.rehearsal.cuda.nccl import Kind, Posted, check

_keys = count()
PAIR, TRIO = (0, 1), (0, 1, 2)


def swap(to: dict[int, int], origin: dict[int, int], ranks: tuple[int, ...] = PAIR) -> Posted:
    """Sends and receives posted together: bytes by peer."""
    return Posted("point_to_point", ranks, tuple(to.items()), tuple(origin.items()), next(_keys))


def collective(kind: Kind = "all_gather", ranks: tuple[int, ...] = PAIR, nbytes: int = 8) -> Posted:
    parts = tuple((rank, nbytes) for rank in ranks)
    return Posted(kind, ranks, parts, parts, next(_keys))


def wait(posted: Posted) -> Posted:
    return posted._replace(kind="wait", sends=(), receives=())


def waited(*calls: Posted) -> list[Posted]:
    """Each waited for before the next is posted."""
    return [event for call in calls for event in (call, wait(call))]


def rules(world: dict[int, list[Posted]], warmed: bool = False) -> list[str]:
    return [fault.rule for fault in check(world, warmed=warmed)]


def test_a_ring_that_turns_has_no_fault() -> None:
    ring = {
        rank: waited(
            *(swap({(rank + 1) % 3: 8}, {(rank - 1) % 3: 8}, TRIO) for _ in range(2)), collective("all_to_all", TRIO)
        )
        for rank in TRIO
    }
    assert not check(ring)


def test_a_send_that_nobody_receives() -> None:
    world = {0: waited(swap({1: 8}, {})), 1: waited(swap({}, {0: 8}), swap({}, {0: 8}))}
    assert rules(world) == ["unmatched", "deadlock"]


def test_a_send_of_another_size() -> None:
    assert rules({0: waited(swap({1: 8}, {})), 1: waited(swap({}, {0: 16}))}) == ["size"]


def test_parts_of_an_all_to_all_of_another_size() -> None:
    assert rules({0: [collective("all_to_all")], 1: [collective("all_to_all", nbytes=16)]}) == ["size"] * 2


def test_another_collective() -> None:
    assert rules({0: [collective("all_to_all")], 1: [collective("all_gather")]}) == ["collective"]


def test_a_collective_that_a_rank_does_not_join() -> None:
    world = {0: waited(collective(), collective()), 1: waited(collective())}
    assert rules(world) == ["absent", "deadlock"]


def test_sends_that_are_waited_for_before_the_receives_are_posted() -> None:
    world = {rank: waited(swap({1 - rank: 8}, {}), swap({}, {1 - rank: 8})) for rank in PAIR}
    assert rules(world) == ["deadlock"]


def test_sends_in_front_of_receives_on_one_communicator_without_a_wait() -> None:
    world = {rank: [swap({1 - rank: 8}, {}), swap({}, {1 - rank: 8})] for rank in PAIR}
    assert rules(world) == ["deadlock"]


def test_posted_together_they_meet() -> None:
    world = {rank: [swap({1 - rank: 8}, {1 - rank: 8})] for rank in PAIR}
    assert not check(world)


def test_a_collective_behind_a_send_on_one_rank_and_in_front_of_it_on_another() -> None:
    world = {0: [swap({1: 8}, {}), collective()], 1: [collective(), swap({}, {0: 8})]}
    assert "deadlock" in rules(world)


OTHER = (1, 0)
"""A second communicator of the same two ranks, which sees them in another order."""


def test_two_communicators_in_flight_in_different_orders() -> None:
    one, other = collective(), collective(ranks=OTHER)
    world = {0: [one, other, wait(one), wait(other)], 1: [other, one, wait(one), wait(other)]}
    assert rules(world, warmed=True) == ["order"]
    assert rules(world) == ["order", "first use"]


def test_two_communicators_in_flight_in_one_order() -> None:
    one, other = collective(), collective(ranks=OTHER)
    assert not check({rank: [one, other, wait(other), wait(one)] for rank in PAIR})


def test_two_communicators_one_after_the_other_that_wait_in_a_circle() -> None:
    one, other = collective(), collective(ranks=OTHER)
    assert rules({0: waited(one, other), 1: waited(other, one)}, warmed=True) == ["deadlock"]


def test_a_communicator_that_a_rank_never_joins() -> None:
    world = {0: waited(swap({1: 8}, {}, TRIO)), 1: waited(swap({}, {0: 8}, TRIO)), 2: []}
    assert rules(world) == ["never joined"]
    assert not check(world, warmed=True)


def test_three_ranks_whose_communicators_are_made_in_a_circle() -> None:
    pairs = ((0, 1), (1, 2), (0, 2))
    ab, bc, ac = (collective(ranks=pair) for pair in pairs)
    world = {0: [ab, ac], 1: [bc, ab], 2: [ac, bc]}
    assert rules(world) == ["order", "first use"]


@pytest.mark.parametrize("rank", PAIR)
def test_what_is_said_names_rank_and_call(rank: int) -> None:
    world = {other: waited(swap({1 - other: 8}, {}), swap({}, {1 - other: 8})) for other in PAIR}
    (fault,) = check(world)
    assert f"rank {rank} in its call 0, point_to_point of [0, 1] with [{1 - rank}]" in fault.what
