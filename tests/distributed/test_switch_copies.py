"""A switch writes its shard once beside the all-to-all, forward and backward: it packs or unpacks, never both."""

from __future__ import annotations

from itertools import permutations
from math import prod

import pytest
import torch
from torch import Tensor

from benchmarks.copies import WrittenBytes
from dsp_plugin import Layout, SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.comm import Route, all_to_all
from dsp_plugin.methods import dsp
from dsp_plugin.spawn import spawn

pytestmark = pytest.mark.distributed
SHAPES = [(7, 5), (1, 7, 5, 3), (3, 7, 5, 4), (3, 4, 5, 7, 2)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sharded(shape: tuple[int, ...], dim: int, groups: SequenceParallelGroups) -> Tensor:
    return Layout("contiguous", shape[dim], groups.dsp.size).shard(random(*shape, seed=1), dim, groups.dsp.rank).clone()


def _written(size: int) -> None:
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method="dsp", size=size))
    for shape in SHAPES:
        for from_dim, to_dim in permutations(range(len(shape)), 2):
            case = f"{shape} {from_dim} -> {to_dim}"
            x = sharded(shape, from_dim, groups).requires_grad_()
            with WrittenBytes() as forward:
                out = dsp.switch(x, from_dim, to_dim, length=shape[from_dim], groups=groups)
            grad = random(*out.shape, seed=2)
            with WrittenBytes() as backward:
                (back,) = torch.autograd.grad(out, x, grad)
            few = prod(shape[: min(from_dim, to_dim)]) <= 1
            packs = not few or from_dim < to_dim
            assert forward.written == (x if packs else out).nbytes, f"{case}: {forward.written} bytes"
            packs = not few or to_dim < from_dim
            assert backward.written == (out if packs else x).nbytes, f"{case}, backward: {backward.written} bytes"
            assert not few or (out.is_contiguous() and back.is_contiguous()), case
            assert out.numel() == out.untyped_storage().nbytes() // 8, f"{case}: not dense"


def _written_of_another_order(size: int) -> None:
    """Its dims reversed in memory, as a model's rearrange may leave a tensor."""
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method="dsp", size=size))
    for shape in SHAPES:
        for from_dim, to_dim in permutations(range(len(shape)), 2):
            x = sharded(shape, from_dim, groups)
            reverse = list(reversed(range(x.dim())))
            x = x.permute(reverse).contiguous().permute(reverse)
            with WrittenBytes() as forward:
                out = dsp.switch(x, from_dim, to_dim, length=shape[from_dim], groups=groups)
            packs = from_dim < to_dim or prod(shape[: min(from_dim, to_dim)]) > 1
            # A scattered dim in front is sent as it lies only if it lies in order.
            reordered = x.nbytes * (not x.is_contiguous())
            expected = x.nbytes if packs else out.nbytes + reordered
            assert forward.written == expected, f"{shape} {from_dim} -> {to_dim}: {forward.written} bytes"


def _written_by_all_to_all(size: int) -> None:
    """The counter would see a switch that packs and unpacks."""
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method="dsp", size=size))
    x = sharded((3, 7, 5, 4), 2, groups)
    with WrittenBytes() as counter:
        (out,) = all_to_all((x,), (Route.even(1, 2, 7, 5, size),), axis=groups.dsp, method="test")
    assert counter.written == x.nbytes + out.nbytes


def _claims(size: int) -> None:
    for claim in (_written, _written_of_another_order, _written_by_all_to_all):
        claim(size)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.matrix), 3])
def test_a_switch_writes_its_shard_once_each_way_and_more_only_to_bring_it_in_order(size):
    spawn(_claims, size, size)
