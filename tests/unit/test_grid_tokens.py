"""Which tokens of a grid each rank holds, without ranks: axes that nobody communicates on."""

from __future__ import annotations

from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.distributed import ProcessGroup

from dsp_plugin.comm.axis import Axis
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.patches.megatron.models.grid_tokens import Tokens, on_device, sharded_dims

NAMES = {"t": "frames", "s": "patches"}
VIDEO, GRID, SEQUENCE = ("t", "s"), ("z", "y", "x"), ("l",)
# Sizes, context-parallel ranks, tensor-parallel ranks with --sequence-parallel.
SIZES = [
    ((7, 25), 1, 1),
    ((7, 25), 3, 1),
    ((6, 5), 2, 2),
    ((8, 6), 4, 2),
    ((9, 5), 2, 3),
    ((12, 4), 4, 2),
    ((6, 5, 3), 3, 2),
    ((2, 5, 7), 2, 1),
    ((38,), 4, 1),
    ((38,), 4, 2),
]
CASES = [
    (sizes, size, parts, sharded)
    for sizes, size, parts in SIZES
    for sharded in {2: VIDEO, 3: GRID, 1: SEQUENCE}[len(sizes)]
]


def tokens(sizes: tuple[int, ...], size: int, rank: int, parts: int = 1, part: int = 0) -> Tokens:
    """Of one rank."""
    axis = Axis("sp", cast(ProcessGroup, SimpleNamespace()), rank, size, tuple(range(size)))
    alone = Axis.alone("dp", rank)
    groups = SequenceParallelGroups.from_axes(sp=axis, ulysses=axis, ring=Axis.alone("ring", rank), dp=alone)
    dims = {2: VIDEO, 3: GRID, 1: SEQUENCE}[len(sizes)]
    found = Tokens(dict(zip(dims, sizes, strict=True)), groups, parts, part, NAMES)
    return found


def held(mine: Tokens, sharded: str) -> list[tuple[int, ...]]:
    """The tokens of a rank, as places in the grid."""
    return list(product(*(mine.own(dim, sharded) for dim in mine.sizes)))


@pytest.mark.parametrize(("sizes", "size", "parts", "sharded"), CASES)
def test_every_token_is_on_one_rank(sizes: tuple[int, ...], size: int, parts: int, sharded: str) -> None:
    found = []
    for rank, part in product(range(size), range(parts)):
        mine = tokens(sizes, size, rank, parts, part)
        mine.check(mine.sizes)
        of_rank = held(mine, sharded)
        assert len(of_rank) == mine.count(sharded)
        found += of_rank
    assert sorted(found) == list(product(*map(range, sizes)))


@pytest.mark.parametrize(("sizes", "size", "parts", "sharded"), CASES)
def test_megatron_gathers_equal_parts_and_all_of_a_dim_that_is_not_sharded(
    sizes: tuple[int, ...], size: int, parts: int, sharded: str
) -> None:
    for rank in range(size):
        of_parts = [tokens(sizes, size, rank, parts, part) for part in range(parts)]
        assert len({mine.count(sharded) for mine in of_parts}) == 1
        first = of_parts[0].first
        gathered = [entry for mine in of_parts for entry in mine.own(first, sharded)]
        for mine in of_parts:
            assert mine.gathered(first, sharded) == gathered
            for dim, length in mine.sizes.items():
                assert dim == sharded or sorted(mine.gathered(dim, sharded)) == list(range(length))


@pytest.mark.parametrize("parts", [1, 2])
def test_a_sequence_is_gathered_to_the_runs_of_its_layout(parts: int) -> None:
    for rank in range(4):
        mine = tokens((38,), 4, rank, parts)
        assert mine.gathered("l", "l") == mine.layout().position_ids(rank).tolist()


@pytest.mark.parametrize(
    ("sizes", "sharded"), [((6, 5), "t"), ((6, 5), "s"), ((6, 5, 3), "z"), ((6, 5, 3), "x"), ((6,), "l")]
)
def test_cut_takes_them_in_order(sizes: tuple[int, ...], sharded: str) -> None:
    mine = tokens(sizes, 2, 1, 2, 1)
    places = torch.stack(torch.meshgrid(*map(torch.arange, sizes), indexing="ij"), dim=-1)
    whole = torch.stack([places, places + 100])
    found = mine.cut(whole, sharded)
    assert [tuple(place) for place in found[:, 0].tolist()] == held(mine, sharded)
    assert torch.equal(found[:, 1], found[:, 0] + 100)


@pytest.mark.parametrize(("frames", "patches", "size"), [(7, 25, 2), (64, 1024, 8), (2, 100, 2)])
def test_a_block_keeps_the_dim_that_it_computes_along(frames: int, patches: int, size: int) -> None:
    sizes = {"t": frames, "s": patches}
    assert sharded_dims(sizes, ["s", "t"] * 3, features=8, element_size=4, size=size) == ("t", "s") * 3


def test_of_three_dims_one_is_kept_over_two_blocks() -> None:
    blocks = ["z", "y", "x"] * 4
    dims = sharded_dims({"z": 4, "y": 4, "x": 4}, blocks, features=8, element_size=4, size=2)
    assert all(dim != along for dim, along in zip(dims, blocks, strict=True))
    assert sum(a != b for a, b in pairwise(dims)) == 5


def test_a_dim_shorter_than_the_ranks_is_not_shared_where_another_can_be() -> None:
    sizes = {"z": 2, "y": 8, "x": 8}
    dims = sharded_dims(sizes, ["z", "y", "x"] * 2, features=8, element_size=4, size=4)
    assert "z" not in dims


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (((7, 25), 2, 0, 2), ["frames=7", "7 / 2 leaves 1", "multiple of 2", "without --sequence-parallel"]),
        (((4, 25), 4, 0, 2), ["frames=4", "2 frames over 2 tensor-parallel ranks", "to 2 or less"]),
        (((3, 25), 4, 0), ["frames=3", "3 frames for 4 context-parallel ranks", "to 3 or less"]),
        (((8, 3), 4, 0), ["patches=3", "3 patches for 4", "to 3 or less"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_arithmetic(sizes: Any, words: list[str]) -> None:
    with pytest.raises(SequenceParallelConfigError) as error:
        tokens(*sizes).check(VIDEO)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_tables_of_a_grid_are_copied_to_a_device_once() -> None:
    device = torch.device("cpu")
    first = on_device([3, 0, 1], device)
    assert first.dtype == torch.int64
    assert first.tolist() == [3, 0, 1]
    assert on_device([3, 0, 1], device) is first
    assert on_device([3, 1], device) is not first
