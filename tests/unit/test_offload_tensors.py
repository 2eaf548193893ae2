"""Which tensors of a checkpoint wait in host memory: shared ones, views, what attention keeps; and on which devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checkpointed import Through, non_reentrant, reentrant
from deferred_copies import copies_of, deferring
from offloaded_stack import BATCH, DIM, EACH, HEADS, LENGTH, ONE, WIDTH, Stack, example, held, same, trained
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from dsp_plugin.kernels import calls
from dsp_plugin.training import host_copies
from dsp_plugin.training.offload import Offload

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_tensor_of_all_layers_goes_once(use_reentrant: bool) -> None:
    offload, angles = deferring(), torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64)
    with held(offload):
        x = example() * 1
        for _ in range(4):
            x = checkpoint(lambda x, by: x.sin() * by.cos(), x, angles, use_reentrant=use_reentrant)
        # Four inputs, and what all of them are given.
        assert offload.counts().host == 5 * ONE
        x.sum().backward()
    assert copies_of(offload).begun == 5 + 4
    assert copies_of(offload).faults == []


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[1:, 2:5, 3:],
        lambda x: x[:, :1].expand(BATCH, 5, WIDTH),
        lambda x: x.permute(2, 0, 1)[1],
        lambda x: x[0, 0, 0],
    ],
)
def test_strides_are_as_they_were(view: Callable[[Tensor], Tensor], use_reentrant: bool) -> None:
    strides = []

    def note(x: Tensor) -> Tensor:
        strides.append((x.shape, x.stride()))
        return x.sin()

    x = example()
    with held(offload := deferring()):
        first = checkpoint(note, view(x * 1), use_reentrant=use_reentrant)
        (first.sum() + checkpoint(torch.sin, x * 1, use_reentrant=use_reentrant).sum()).backward()
    assert copies_of(offload).done >= 2
    assert strides[0] == strides[1]
    expected = example()
    (view(expected).sin().sum() + expected.sin().sum()).backward()
    assert x.grad is not None
    assert expected.grad is not None
    assert torch.allclose(x.grad, expected.grad, rtol=0, atol=1e-15)


def test_views_of_one_storage_go_once() -> None:
    with held(offload := deferring()):
        x = example() * 1
        found = checkpoint(lambda a, b, c: a.sin().sum() + b.sin().sum() + c.sum(), x, x[1], x.mT, use_reentrant=False)
        assert offload.counts().host == ONE
        found.backward()


def test_tensors_between_each_other_go_once() -> None:
    with held(offload := deferring()):
        parts = (example() * 1).split((1, 3, WIDTH - 4), -1)
        found = checkpoint(lambda a, b, c: a.sin().sum() + (b * c.sum()).sin().sum(), *parts, use_reentrant=False)
        assert offload.counts().host == ONE
        found.backward()


def test_parameters_and_small_tensors_stay() -> None:
    weight, small = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64)), torch.ones(2, dtype=torch.float64)
    with held(offload := deferring(floor=ONE)):
        x = example() * 1
        out = checkpoint(lambda x, w, s: x @ w * s[0], x, weight, small, use_reentrant=False)
        assert offload.counts().host == ONE
        out.sum().backward()


@pytest.mark.parametrize("each", EACH)
def test_what_attention_keeps_waits_on_the_host_too(each: Through) -> None:
    offload, model = deferring(), Stack(each)
    with held(offload, keep=True):
        loss = model(example()).sum()
        kept = HEADS * BATCH * LENGTH * (DIM + 1) * 8
        assert offload.counts().host == len(model.layers) * (ONE + kept)
        with calls() as made:
            loss.backward()
        assert made.forward == 0
    assert offload.counts().host == 0


def test_a_storage_that_is_emptied_to_be_filled_again_stays() -> None:
    """As Megatron's `CheckpointWithoutOutput` empties what it makes again before the backward pass."""
    x = example()
    with held(offload := deferring()):
        first = x * 1
        whole = first.detach().clone()
        second = reentrant(torch.sin, first)
        first.untyped_storage().resize_(0)
        third = reentrant(torch.sin, second)
        first.untyped_storage().resize_(ONE)
        with torch.no_grad():
            first.data.copy_(whole)
        third.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, x.sin().cos() * x.cos())
    assert offload.counts().device == 0


def test_of_two_models_the_newest_offload_serves_both() -> None:
    models, offloads = [Stack(non_reentrant), Stack(reentrant)], [deferring(), deferring()]
    with held(None):
        expected = [trained(model) for model in models]
    with held(offloads[0]), held(offloads[1]):
        assert all(same(trained(model), each) for model, each in zip(models, expected, strict=True))
    with held(offloads[0]):
        assert same(trained(models[0]), expected[0])
    assert [offload.counts().stretches for offload in offloads] == [4, 8]


def test_auto_moves_what_takes_more_than_half_of_what_is_free() -> None:
    model = Stack(non_reentrant, 6)
    for free, moved in ((100 * ONE, [0, 0]), (7 * ONE, [3, 6])):
        offload = deferring(free=free, auto=True)
        with held(offload):
            before = 0
            for expected in moved:
                trained(model)
                assert (offload.counts().moved - before) // ONE == expected
                before = offload.counts().moved


def test_on_cpu_nothing_moves_and_all_is_counted() -> None:
    offload, model = Offload(), Stack(reentrant)
    with held(None):
        expected = trained(model)
    model.inputs.clear()
    with held(offload):
        out = model(example())
        assert offload.counts()[:4] == (4 * ONE, 4 * ONE, 4 * ONE, 0)
        assert model.alive() == [True] * 4
        del out
        assert same(trained(model), expected)
    assert offload.counts().host == 0
    assert offload.pool.made == 0


def test_without_data_bytes_move_where_the_device_is_another_one() -> None:
    with FakeTensorMode():
        assert isinstance(host_copies.copies_of(torch.empty(4, device="cuda")), host_copies.AtOnce)
        assert isinstance(host_copies.copies_of(torch.empty(4)), host_copies.InPlace)


@pytest.mark.parametrize("each", EACH)
def test_in_a_dry_run_bytes_leave_and_come_back(each: Through) -> None:
    # Not on fake CUDA tensors: a torch without CUDA has no threads for their backward passes.
    offload = Offload(floor=1, copies=lambda _: host_copies.AtOnce())
    with held(offload), FakeTensorMode():
        x = torch.empty(BATCH, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True) * 1
        inputs: list[StorageWeakRef] = []
        for _ in range(4):
            inputs.append(StorageWeakRef(x.untyped_storage()))
            x = each(torch.sin, x)
        assert [not storage.expired() for storage in inputs] == [False, False, False, True]
        assert offload.counts().host == 4 * ONE
        x.sum().backward()
        del x
    assert offload.counts().host == 0
