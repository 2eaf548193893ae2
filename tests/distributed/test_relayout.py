"""Relayout against cutting the whole sequence anew: values, gradients, exact bytes, for all layouts and sizes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dsp_plugin import CollectiveMismatchError, Layout, SequenceParallelConfig, SequenceParallelGroups, ledger
from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.relayout import relayout, relayout_bytes
from dsp_plugin.spawn import RankFailure, spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
SIZES = [1, 2, 3, 4]
LENGTHS = [1, 3, 13]


def lasp_axis(debug: bool = False) -> Axis:
    config = SequenceParallelConfig(method="ulysses", size=dist.get_world_size(), debug=debug)
    return SequenceParallelGroups.build(config).lasp


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layouts(length: int, size: int) -> list[Layout]:
    """Every kind; sizes with an empty shard, and documents of which some are empty."""
    sizes = [0] * size
    for token in range(length):
        sizes[(token * token) % size] += 1
    return [
        Layout("contiguous", length, size),
        Layout.of_sizes(sizes),
        Layout("zigzag", length, size),
        Layout("zigzag", length, size, documents=(0, length // 3, length // 3, length - length // 4, length)),
        Layout("zigzag", length, size, documents=tuple(range(length + 1)), whole_below=2),
        Layout("striped", length, size),
    ]


def _there_and_back(debug: bool) -> int:
    """Whole tensors of two dtypes and several shapes, dim 1 the sequence, through every pair of layouts."""
    axis = lasp_axis(debug)
    moves = 0
    for length in LENGTHS:
        x, y = random(2, length, 3, seed=1), random(3, length, seed=2)
        z, ids = random(1, length, 2, 2, seed=3).float(), torch.arange(5, 5 + length)[None]
        grads = [random(2, length, 3, seed=4), random(3, length, seed=5), random(1, length, 2, 2, seed=6).float()]
        for source, target in product(layouts(length, axis.size), repeat=2):
            leaves = [source.shard(t, 1, axis.rank).clone().requires_grad_() for t in (x, y, z)]
            with ledger() as log:
                *moved, positions = relayout(
                    [*leaves, source.shard(ids, 1, axis.rank)], 1, source, target, axis=axis, method="test"
                )
                forward = log.bytes(phase="forward")
                wanted = [target.shard(t, 1, axis.rank) for t in grads]
                found = torch.autograd.grad(moved, leaves, wanted)
            for got, whole in zip((*moved, positions), (x, y, z, ids), strict=True):
                assert torch.equal(got, target.shard(whole, 1, axis.rank)), (source, target)
            for got, whole in zip(found, grads, strict=True):
                assert torch.equal(got, source.shard(whole, 1, axis.rank)), (source, target)
            per_token = (2 * 3 + 3) * 8 + 2 * 2 * 4
            assert forward == relayout_bytes(source, target, axis.rank, per_token + 8)
            assert log.bytes(phase="backward") == relayout_bytes(target, source, axis.rank, per_token)
            assert log.bytes(method="test", group="lasp") == log.bytes()
            # One exchange per dtype: fp64, fp32 and int64 there, the first two back.
            moves += log.calls()
            assert log.calls() in (0, 5)
    return moves


@pytest.mark.parametrize("size", SIZES)
def test_tokens_and_gradients_arrive_where_the_layout_puts_them(size):
    moves = spawn(_there_and_back, size, True, timeout=90.0)
    assert len(set(moves)) == 1
    assert (moves[0] > 0) == (size > 1)


def test_bytes_are_those_of_the_tokens_that_change_rank():
    runs, zigzag = Layout("contiguous", 16, 4), Layout("zigzag", 16, 4)
    # Rank 0 holds 0-3 and wants 0, 1, 14, 15; rank 3 holds 12-15 and wants 6-9.
    assert [relayout_bytes(runs, zigzag, rank, 10) for rank in range(4)] == [20, 40, 20, 40]
    assert [relayout_bytes(zigzag, runs, rank, 10) for rank in range(4)] == [20, 40, 20, 40]
    assert relayout_bytes(runs, runs, 1, 10) == 0
    assert relayout_bytes(Layout("zigzag", 16, 1), Layout("contiguous", 16, 1), 0, 10) == 0


def _part_of_the_gradients() -> None:
    axis = lasp_axis()
    source, target = Layout("contiguous", 9, axis.size), Layout("zigzag", 9, axis.size)
    wanted = random(source.sizes[axis.rank], 4, seed=1).requires_grad_()
    fixed = random(source.sizes[axis.rank], 6, seed=2)
    with ledger() as log:
        a, b = relayout([fixed, wanted], 0, source, target, axis=axis, method="test")
        (a.sum() + b.sum()).backward()
    assert torch.equal(wanted.grad, torch.ones_like(wanted))
    assert log.bytes(phase="backward") == relayout_bytes(target, source, axis.rank, 4 * 8)


def test_tensors_without_a_gradient_send_none():
    spawn(_part_of_the_gradients, 3)


def _bfloat16_from_the_back_and_strided() -> None:
    axis = lasp_axis()
    source, target = Layout("striped", 7, axis.size), Layout("contiguous", 7, axis.size)
    whole = random(3, 7, 2, seed=1).bfloat16()
    (moved,) = relayout([source.shard(whole.mT, -1 % 3, axis.rank)], -1, source, target, axis=axis, method="test")
    assert torch.equal(moved, target.shard(whole.mT, 2, axis.rank))
    assert moved.is_contiguous()


def test_any_dim_dtype_and_strides():
    spawn(_bfloat16_from_the_back_and_strided, 3)


def _other_length_on_one_rank() -> None:
    axis = lasp_axis(debug=True)
    length = 10 if axis.rank == 1 else 8
    source, target = Layout("contiguous", length, axis.size), Layout("zigzag", length, axis.size)
    relayout([torch.zeros(source.sizes[axis.rank], 2)], 0, source, target, axis=axis, method="test")


def test_debug_mode_finds_ranks_that_move_different_sequences():
    with pytest.raises(RankFailure, match="disagree on the shapes") as failure:
        spawn(_other_length_on_one_rank, 2)
    assert {type(error) for error in failure.value.errors.values()} == {CollectiveMismatchError}
