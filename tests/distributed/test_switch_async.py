"""Switches started early and waited for late: the values, gradients and bytes of `switch`, hidden behind work."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsp_plugin import CollectiveMismatchError, Layout, SequenceParallelConfig, SequenceParallelGroups, ledger
from dsp_plugin.comm import wire
from dsp_plugin.comm.meter import meter
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.methods import dsp
from dsp_plugin.spawn import spawn

pytestmark = pytest.mark.distributed
Groups = SequenceParallelGroups
SIZES = [1, 2, 3, 4]
SHAPES = [(7, 5), (2, 7, 5, 3), (3, 4, 3, 6, 2)]
WIDER = [(1, 6, 7, 5, 2), (3, 3, 5, 7), (9, 1, 2, 3), (2, 3, 2, 5, 4, 3)]


def build(size: int, debug: bool = False) -> Groups:
    return Groups.build(SequenceParallelConfig(method="dsp", size=size, debug=debug))


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def part(x: Tensor, dim: int, groups: Groups) -> Tensor:
    """This rank's, in memory of its own."""
    return Layout("contiguous", x.shape[dim], groups.dsp.size).shard(x, dim, groups.dsp.rank).clone()


def start(x: Tensor, from_dim: int, to_dim: int, whole: Tensor, groups: Groups) -> dsp.PendingSwitch:
    return dsp.switch_start(x, from_dim, to_dim, length=whole.shape[from_dim], groups=groups)


def _exact(groups: Groups, dtypes: list[torch.dtype], shapes: list[tuple[int, ...]]) -> None:
    """Data only moves, so all of it is equal to the bit."""
    for dtype in dtypes:
        for shape in shapes:
            for from_dim, to_dim in permutations(range(len(shape)), 2):
                whole, grad = random(*shape, seed=1).to(dtype), random(*shape, seed=2).to(dtype)
                found, bytes_sent = [], []
                for switch in (
                    lambda x, *dims, whole=whole: start(x, *dims, whole, groups).wait(),
                    lambda x, *dims, whole=whole: dsp.switch(x, *dims, length=whole.shape[dims[0]], groups=groups),
                ):
                    x = part(whole, from_dim, groups).requires_grad_()
                    with ledger() as log:
                        out = switch(x, from_dim, to_dim)
                        out.backward(part(grad, to_dim, groups))
                    found.append((out, x.grad))
                    bytes_sent.append((log.bytes(phase="forward"), log.bytes(phase="backward"), log.calls()))
                case = f"{dtype} {shape} {from_dim} -> {to_dim}"
                for out, x_grad in found:
                    assert torch.equal(out, part(whole, to_dim, groups)), case
                    assert torch.equal(x_grad, part(grad, from_dim, groups)), case
                formula = dsp.switch_bytes(
                    shape, from_dim, to_dim, size=groups.dsp.size, rank=groups.dsp.rank, element_size=dtype.itemsize
                )
                assert bytes_sent == [(*formula, 0 if groups.dsp.size == 1 else 2)] * 2, case


def _in_flight_together(groups: Groups) -> None:
    """Three of them, waited for in another order, and one whose gradient comes back twice."""
    whole = [random(2, 7, 5, 3, seed=1), random(6, 5, 4, seed=2), random(11, 4, 6, seed=3)]
    dims = [(1, 2), (0, 2), (2, 0)]
    leaves = [part(x, pair[0], groups).requires_grad_() for x, pair in zip(whole, dims, strict=True)]
    pending = [start(x, *pair, w, groups) for x, pair, w in zip(leaves, dims, whole, strict=True)]
    out = {index: pending[index].wait() for index in (2, 0, 1)}
    for index, (_, to_dim) in enumerate(dims):
        assert torch.equal(out[index], part(whole[index], to_dim, groups))
    loss = sum((out[index] ** (2 + index)).sum() for index in range(3))
    loss.backward(retain_graph=True)
    loss.backward()
    for index, (leaf, x) in enumerate(zip(leaves, whole, strict=True)):
        expected = 2 * (2 + index) * x ** (1 + index)
        torch.testing.assert_close(leaf.grad, part(expected, dims[index][0], groups), rtol=1e-10, atol=1e-10)


def _beside_work_of_the_same_tensor(groups: Groups) -> None:
    """Both branches reach the leaf, in a stretch that is recomputed too."""
    whole, weight = random(2, 7, 5, 4, seed=1), random(4, 4, seed=2)
    expected = whole.clone().requires_grad_()
    moved, worked = (expected * 1.5).sin(), (expected @ weight).tanh()
    ((moved * moved).sum() + (worked * worked).sum()).backward()

    def stretch(x: Tensor) -> tuple[Tensor, Tensor]:
        pending = start(x * 1.5, 1, 2, whole, groups)
        worked = (x @ weight).tanh()
        return pending.wait().sin(), worked

    for run in (stretch, lambda x: checkpoint(stretch, x, use_reentrant=False)):
        x = part(whole, 1, groups).requires_grad_()
        moved, worked = run(x)
        ((moved * moved).sum() + (worked * worked).sum()).backward()
        torch.testing.assert_close(x.grad, part(expected.grad, 1, groups), rtol=1e-10, atol=1e-10)


def _life_of_a_pending_switch(groups: Groups) -> None:
    """Never waited for, waited for twice, written to before and after, without gradients."""
    whole = random(2, 7, 5, 3, seed=1)
    x = part(whole, 1, groups).requires_grad_()
    with ledger() as log:
        start(x, 1, 2, whole, groups)
    sent = dsp.switch_bytes(whole.shape, 1, 2, size=groups.dsp.size, rank=groups.dsp.rank, element_size=8)
    assert log.bytes() == sent.forward

    pending = start(x * 2, 1, 2, whole, groups)
    out = pending.wait()
    assert pending.wait() is out
    out += 1
    out.mul_(3)
    out.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 6))

    with torch.inference_mode():
        assert torch.equal(start(x + 0, 1, 2, whole, groups).wait(), part(whole, 2, groups))
    for pair in ((1, 2), (2, 1)):
        local = part(whole, pair[0], groups)
        pending = start(local, *pair, whole, groups)
        local.zero_()
        if groups.dsp.size == 1:
            continue
        with pytest.raises(SequenceParallelConfigError, match="written to in place between the start") as raised:
            pending.wait()
        assert "to a clone" in str(raised.value)


def _claims(size: int) -> None:
    groups = build(size)
    _exact(groups, [torch.float64], SHAPES)
    _exact(groups, [torch.bfloat16], SHAPES[1:2])
    for claim in (_in_flight_together, _beside_work_of_the_same_tensor, _life_of_a_pending_switch):
        claim(groups)


@pytest.mark.parametrize("size", SIZES)
def test_a_started_switch_is_the_switch_to_the_bit_however_it_is_waited_for(size):
    spawn(_claims, size, size)


def _wider(size: int) -> None:
    _exact(build(size), [torch.float64, torch.float32, torch.float16, torch.bfloat16], SHAPES + WIDER)


@pytest.mark.matrix
@pytest.mark.parametrize("size", SIZES)
def test_a_started_switch_is_the_switch_to_the_bit_for_more_shapes_and_dtypes(size):
    spawn(_wider, size, size, timeout=240.0)


class _Work(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, happened: list[str]) -> Tensor:
        ctx.happened = happened
        happened.append("work")
        return x * 2

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ctx.happened.append("work")
        return grad * 2, None


def _order(size: int) -> tuple[list[str], float]:
    groups = build(size)
    happened: list[str] = []

    def noted(method: Callable[..., None], what: str) -> Callable[..., None]:
        def note(*args: object) -> None:
            happened.append(what)
            method(*args)

        return note

    wire.Exchange.__init__ = noted(wire.Exchange.__init__, "start")
    wire.Exchange.wait = noted(wire.Exchange.wait, "wait")
    whole = random(2, 7, 5, 3, seed=1)
    x = part(whole, 1, groups).requires_grad_()
    with meter() as clock:
        pending = start(x.sin(), 1, 2, whole, groups)
        worked = _Work.apply(x.cos(), happened)
        out = pending.wait()
        (out.sum() + worked.sum()).backward()
    return happened, clock.waited()


def test_work_between_start_and_wait_lies_between_them_in_backward_too():
    for happened, waited in spawn(_order, 2, 2):
        assert happened == ["start", "work", "wait"] * 2
        assert waited > 0


def _other_dims(size: int) -> list[str]:
    os.environ["DSP_PLUGIN_DEBUG_TIMEOUT"] = "15"
    groups = build(size, debug=True)
    _in_flight_together(groups)
    whole = random(3, 4, 4, 2, seed=1)
    found = []
    for mismatched in (False, True):
        x = part(whole, 1, groups) if groups.dsp.rank or not mismatched else part(whole, 1, groups)[:2]
        try:
            start(x, 1, 2, whole, groups).wait()
        except CollectiveMismatchError as error:
            found.append(str(error))
    return found


@pytest.mark.timeout(60)
def test_debug_mode_compares_what_ranks_are_about_to_start():
    for found in spawn(_other_dims, 2, 2, timeout=30.0):
        (message,) = found
        assert "disagree on the shapes" in message
        assert "ranks [0]: [(2, 4, 4, 2)]" in message
        assert "ranks [1]: [(3, 4, 4, 2)]" in message
