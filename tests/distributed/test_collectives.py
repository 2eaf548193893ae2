"""Collectives against what one process computes: values, gradients, bytes, for any sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dsp_plugin import Axis, Layout, SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.comm import Route, all_gather, all_to_all, gather, ledger, reduce_scatter, replicate, ring_hop, split
from dsp_plugin.layout import LAYOUTS, shard_ranges
from dsp_plugin.spawn import spawn

pytestmark = pytest.mark.distributed
SIZES = [1, 2, 3, 4]


def sp_axis(size: int) -> Axis:
    return SequenceParallelGroups.build(SequenceParallelConfig(method="ulysses", size=size)).sp


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with(shape: list[int], dim: int, length: int) -> list[int]:
    return [*shape[:dim], length, *shape[dim + 1 :]]


def _each(size: int, claim: Callable[..., None], cases: list[tuple]) -> None:
    """Check a claim case by case in one world, and say which case failed."""
    axis = sp_axis(size)
    for case in cases:
        try:
            claim(axis, *case)
        except AssertionError as error:
            raise AssertionError(f"{claim.__name__}{case}: {error}") from error


def _all_to_all(axis: Axis, scatter_dim: int, gather_dim: int, kind: str) -> None:
    size = axis.size
    shape = [5, 7, 6, 4]
    layout = Layout(kind, shape[gather_dim], size)
    runs = tuple((run,) for run in shard_ranges(shape[scatter_dim], size))
    tokens = tuple(layout.spans(rank) for rank in range(size))
    route = Route(scatter_dim, gather_dim, runs, tokens)
    # A second tensor travels in the same collective, its runs overlapping: a rank also wants its neighbour's first.
    wanted = tuple(range(run.start, min(run.stop + 1, shape[scatter_dim])) for (run,) in runs)
    shared = Route(scatter_dim, gather_dim, tuple((run,) for run in wanted), tokens)
    x, y = random(*shape, seed=1), random(*shape, seed=2)
    local = [layout.shard(t, gather_dim, axis.rank).clone().requires_grad_() for t in (x, y)]
    with ledger() as log:
        out, more = all_to_all(local, (route, shared), axis=axis, method="test")
        own = runs[axis.rank][0]
        torch.testing.assert_close(out, x.narrow(scatter_dim, own.start, len(own)))
        torch.testing.assert_close(more, y.narrow(scatter_dim, own.start, len(wanted[axis.rank])))
        grad = random(*shape, seed=3)
        grad_more = [random(*_with(shape, scatter_dim, len(run)), seed=10 + rank) for rank, run in enumerate(wanted)]
        torch.autograd.backward([out, more], [grad.narrow(scatter_dim, own.start, len(own)), grad_more[axis.rank]])
    torch.testing.assert_close(local[0].grad, layout.shard(grad, gather_dim, axis.rank))
    expected = torch.zeros_like(y)
    for run, part in zip(wanted, grad_more, strict=True):
        expected.narrow(scatter_dim, run.start, len(run)).add_(part)
    torch.testing.assert_close(local[1].grad, layout.shard(expected, gather_dim, axis.rank))
    mine, per_entry = layout.sizes[axis.rank], local[0].numel() // max(layout.sizes[axis.rank] * shape[scatter_dim], 1)
    leaving = shape[scatter_dim] - len(own) + sum(map(len, wanted)) - len(wanted[axis.rank])
    forward = mine * per_entry * leaving * 8
    assert log.bytes(method="test", phase="forward") == forward
    assert log.calls(method="test") == (0 if size == 1 else 2)


@pytest.mark.parametrize("size", SIZES)
def test_all_to_all_moves_exact_uneven_parts_and_their_gradients(size):
    dims = [(2, 1), (1, 2), (0, 3), (3, 0), (0, 1)]
    spawn(_each, size, size, _all_to_all, [(*pair, kind) for pair in dims for kind in LAYOUTS])


def _gather_and_reduce(axis: Axis, length: int, kind: str) -> None:
    size = axis.size
    layout = Layout(kind, length, size)
    x = random(2, length, 3, seed=1)
    grads = [random(2, length, 3, seed=10 + rank) for rank in range(size)]
    others = 2 * 3 * 8

    local = layout.shard(x, 1, axis.rank).clone().requires_grad_()
    with ledger() as log:
        whole = all_gather(local, 1, layout, axis=axis, method="test")
        whole.backward(grads[axis.rank])
    torch.testing.assert_close(whole, x)
    torch.testing.assert_close(local.grad, layout.shard(sum(grads), 1, axis.rank))
    mine = layout.sizes[axis.rank]
    assert log.bytes(phase="forward") == (size - 1) * mine * others
    assert log.bytes(phase="backward") == (length - mine) * others * (size > 1)

    summand = grads[axis.rank].clone().requires_grad_()
    reduced = reduce_scatter(summand, 1, layout, axis=axis, method="test")
    torch.testing.assert_close(reduced, layout.shard(sum(grads), 1, axis.rank))
    reduced.backward(layout.shard(x, 1, axis.rank))
    torch.testing.assert_close(summand.grad, x)


@pytest.mark.parametrize("size", SIZES)
def test_all_gather_and_reduce_scatter_are_each_others_gradient(size):
    spawn(_each, size, size, _gather_and_reduce, [(length, kind) for length in (8, 7, 2) for kind in LAYOUTS])


def _region(axis: Axis) -> None:
    """A model with a replicated head and tail, a sharded middle, and a replicated condition used in the middle."""
    size = axis.size
    layout = Layout("contiguous", 7, size)

    def loss_of(x, condition, weights, enter, leave, share):
        first, middle, last = weights
        h = enter((x * first).tanh())
        h = (h * middle + share(condition)).sin()
        return ((leave(h) * last) ** 2).mean()

    def leaves():
        return (
            random(7, 3, seed=1).requires_grad_(),
            random(3, seed=2).requires_grad_(),
            [random(3, seed=seed).requires_grad_() for seed in (3, 4, 5)],
        )

    x, condition, weights = leaves()

    def same(t):
        return t

    expected = loss_of(x, condition, weights, same, same, same)
    expected.backward()
    x2, condition2, weights2 = leaves()
    loss = loss_of(
        x2,
        condition2,
        weights2,
        lambda t: split(t, 0, layout, axis=axis, method="test"),
        lambda t: gather(t, 0, layout, axis=axis, method="test"),
        lambda t: replicate(t, axis=axis, method="test"),
    )
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(x2.grad, x.grad)
    torch.testing.assert_close(condition2.grad, condition.grad)
    for sharded, reference in zip(weights2, weights, strict=True):
        stacked = all_gather(sharded.grad.unsqueeze(0), 0, Layout.of_sizes([1] * size), axis=axis, method="test")
        torch.testing.assert_close(stacked.mean(0), reference.grad)


@pytest.mark.parametrize("size", SIZES)
def test_mean_over_ranks_of_gradients_is_exact_before_inside_and_after_a_sharded_region(size):
    spawn(_each, size, size, _region, [()])


def _hop(axis: Axis, shift: int) -> None:
    size = axis.size
    shards = [random(rank + 1, 2, seed=rank) for rank in range(size)]
    grads = [random(rank + 1, 2, seed=10 + rank) for rank in range(size)]
    origin = (axis.rank - shift) % size
    x = shards[axis.rank].clone().requires_grad_()
    with ledger() as log:
        y = ring_hop(x, shift, shards[origin].shape, axis=axis, method="test")
        y.backward(grads[origin])
    torch.testing.assert_close(y, shards[origin])
    torch.testing.assert_close(x.grad, grads[axis.rank])
    if origin != axis.rank:
        assert log.bytes(phase="forward") == shards[axis.rank].numel() * 8
        assert log.bytes(phase="backward") == shards[origin].numel() * 8


@pytest.mark.parametrize("size", SIZES)
def test_ring_hop_carries_uneven_shards_and_returns_their_gradients(size):
    spawn(_each, size, size, _hop, [(shift,) for shift in (1, -1, 2)])
