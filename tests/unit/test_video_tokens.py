"""Which tokens of a video each rank holds, without ranks: axes that nobody communicates on."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from torch.distributed import ProcessGroup

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import Axis, SequenceParallelGroups
from dsp_plugin.patches.megatron.video_tokens import Tokens, sharded_dims

DIMS: tuple[Literal["t"], Literal["s"]] = ("t", "s")
# Frames, patches, context-parallel ranks, tensor-parallel ranks with --sequence-parallel.
SIZES = [(7, 25, 1, 1), (7, 25, 3, 1), (6, 5, 2, 2), (8, 6, 4, 2), (9, 5, 2, 3), (12, 4, 4, 2)]


def tokens(frames: int, patches: int, size: int, rank: int, parts: int = 1, part: int = 0) -> Tokens:
    """Of one rank."""
    axis = Axis("sp", cast(ProcessGroup, SimpleNamespace()), rank, size, tuple(range(size)))
    alone = Axis.alone("dp", rank)
    groups = SequenceParallelGroups.from_axes(sp=axis, ulysses=axis, ring=Axis.alone("ring", rank), dp=alone)
    return Tokens(frames, patches, groups, parts, part)


@pytest.mark.parametrize("sharded", DIMS)
@pytest.mark.parametrize(("frames", "patches", "size", "parts"), SIZES)
def test_every_token_is_on_one_rank(frames: int, patches: int, size: int, parts: int, sharded: Any) -> None:
    held = []
    for rank, part in product(range(size), range(parts)):
        mine = tokens(frames, patches, size, rank, parts, part)
        of_rank = list(product(mine.own_frames(sharded), mine.own_patches(sharded)))
        assert len(of_rank) == mine.count(sharded)
        held += of_rank
    assert sorted(held) == list(product(range(frames), range(patches)))


@pytest.mark.parametrize("sharded", DIMS)
@pytest.mark.parametrize(("frames", "patches", "size", "parts"), SIZES)
def test_megatron_gathers_equal_parts_and_every_frame(
    frames: int, patches: int, size: int, parts: int, sharded: Any
) -> None:
    for rank in range(size):
        of_parts = [tokens(frames, patches, size, rank, parts, part) for part in range(parts)]
        assert len({mine.count(sharded) for mine in of_parts}) == 1
        gathered = [frame for mine in of_parts for frame in mine.own_frames(sharded)]
        assert all(mine.gathered_frames(sharded) == gathered for mine in of_parts)
        assert sharded == "t" or sorted(gathered) == list(range(frames))


@pytest.mark.parametrize("sharded", DIMS)
def test_cut_takes_them_frame_by_frame(sharded: Any) -> None:
    mine = tokens(6, 5, 2, 1, 2, 1)
    video = torch.arange(6 * 5).view(1, 6, 5, 1).repeat(2, 1, 1, 1)
    expected = [frame * 5 + patch for frame in mine.own_frames(sharded) for patch in mine.own_patches(sharded)]
    assert mine.cut(video, sharded)[:, 0, 0].tolist() == expected


@pytest.mark.parametrize(("frames", "patches", "size"), [(7, 25, 2), (64, 1024, 8), (2, 100, 2)])
def test_every_block_keeps_the_dim_that_it_computes_along(frames: int, patches: int, size: int) -> None:
    dims = sharded_dims(frames, patches, layers=3, features=8, element_size=4, size=size)
    assert dims == ("t", "s") * 3


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((7, 25, 2, 0, 2), ["frames=7", "7 / 2 leaves 1", "multiple of 2", "without --sequence-parallel"]),
        ((4, 25, 4, 0, 2), ["frames=4", "2 frames over 2 tensor-parallel ranks", "to 2 or less"]),
        ((3, 25, 4, 0), ["frames=3", "3 frames for 4 context-parallel ranks", "to 3 or less"]),
        ((8, 3, 4, 0), ["patches=3", "3 patches for 4", "to 3 or less"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_the_arithmetic(sizes: tuple[int, ...], words: list[str]) -> None:
    with pytest.raises(SequenceParallelConfigError) as error:
        tokens(*sizes)
    assert all(word in str(error.value) for word in words), str(error.value)
