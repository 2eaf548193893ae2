"""Checkpoints that wait in host memory: where their bytes are when, that they come back unchanged, what is refused."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from checkpointed import WAYS, Through, non_reentrant, reentrant
from deferred_copies import copies_of, deferring
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from dsp_plugin import Layout, MaskSpec, SequenceParallelConfigError, SequenceParallelGroups
from dsp_plugin.kernels import calls
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.method import Where
from dsp_plugin.patches import recompute as patches
from dsp_plugin.training import host_copies
from dsp_plugin.training.offload import Offload

pytestmark = pytest.mark.timeout(120)

BATCH, LENGTH, HEADS, DIM = 2, 7, 2, 4
WIDTH = HEADS * DIM
ONE = BATCH * LENGTH * WIDTH * 8
"""Bytes that a layer's checkpoint keeps."""
EACH = [non_reentrant, reentrant]


@contextmanager
def held(offload: Offload | None, *, keep: bool = False) -> Iterator[None]:
    release = patches.hold(patches.TORCH, keep=keep, offload=offload)
    try:
        yield
    finally:
        release()


class Layer(nn.Module):
    """Attention, dropout, and an input that is needed again at the end; tells who looks when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.look: Callable[[], None] = lambda: None

    def forward(self, x_BLC: Tensor) -> Tensor:
        self.look()
        q, k, v = self.qkv(x_BLC).unflatten(-1, (-1, DIM)).split(HEADS, dim=2)
        out = METHODS["ring"].attention(
            q,
            k,
            v,
            what=AttentionSpec(MaskSpec(causal=True)),
            where=Where(SequenceParallelGroups.single(), Layout("contiguous", LENGTH, 1)),
        )
        return x_BLC + nn.functional.dropout(self.out(out.flatten(2)), 0.3)


class Stack(nn.Module):
    """Layers, each through a checkpoint. ``inputs`` are the storages that they were given."""

    def __init__(self, each: Through, depth: int = 4, whole: Through | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(Layer() for _ in range(depth)).double()
        self.each, self.whole = each, whole or (lambda body, x: body(x))
        self.inputs: list[StorageWeakRef] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(self.body, x * 1)

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            self.inputs.append(StorageWeakRef(x.untyped_storage()))
            x = self.each(layer, x)
        return x

    def alive(self) -> list[bool]:
        return [not storage.expired() for storage in self.inputs]


def example() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()


def trained(model: nn.Module, *, backward: Callable[[Tensor], object] = Tensor.backward) -> list[Tensor]:
    """The loss of a step and its gradients."""
    model.zero_grad()
    torch.manual_seed(2)
    x = example()
    loss = model(x).square().sum()
    backward(loss)
    assert x.grad is not None
    return [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("keep", [False, True], ids=["full", "keep_attention"])
@pytest.mark.parametrize("way", [name for name, (*_, patched) in WAYS.items() if patched])
def test_a_step_is_the_same_to_the_bit(way: str, keep: bool) -> None:
    whole, each, _ = WAYS[way]
    model = Stack(each, whole=whole)
    with held(None, keep=keep):
        expected = trained(model)
    offload = deferring()
    with held(offload, keep=keep):
        assert same(trained(model), expected)
        assert same(trained(model), expected)
    assert copies_of(offload).faults == []
    assert copies_of(offload).done > 0
    assert offload.counts()[0] == 0, "host memory is given back"
    assert offload.counts().device == 0


@pytest.mark.parametrize("each", EACH)
def test_what_waits_is_off_the_device_and_the_last_one_never_leaves(each: Through) -> None:
    offload = deferring()
    for depth in (2, 6):
        model = Stack(each, depth)
        with held(offload):
            out = model(example())
            assert model.alive() == [False] * (depth - 1) + [True]
            assert offload.counts().host == depth * ONE
            del out
        assert offload.counts().host == 0


@pytest.mark.parametrize("each", EACH)
def test_a_stretch_comes_back_while_the_one_after_it_runs_again(each: Through) -> None:
    offload, seen = deferring(), []
    model = Stack(each, 5)
    with held(offload):
        loss = model(example()).sum()
        copies = copies_of(offload)
        assert copies.begun == 5, "each layer's input went to the host"
        for layer in model.layers:
            layer.look = lambda: seen.append(copies.begun - 5)
        loss.backward()
    # The last one is here, and the one before has begun to come; of each that runs, the one before it has.
    assert seen == [1, 2, 3, 4, 4]


@pytest.mark.parametrize("each", EACH)
def test_buffers_are_made_in_the_first_step_alone(each: Through) -> None:
    offload, model = deferring(), Stack(each)
    with held(offload):
        trained(model)
        made = offload.pool.made
        trained(model)
        trained(model)
    assert made == len(model.layers)
    assert offload.pool.made == made
    assert offload.counts().host_held == len(model.layers) * ONE


@pytest.mark.parametrize("each", EACH)
def test_what_a_limit_does_not_hold_stays_and_that_is_the_last(each: Through) -> None:
    offload, model = deferring(2 * ONE), Stack(each, 5)
    with held(None):
        expected = trained(model)
    model.inputs.clear()
    with held(offload):
        out = model(example())
        assert model.alive() == [False, False, True, True, True]
        assert offload.counts().device == 3 * ONE
        del out
        assert same(trained(model), expected)
    assert offload.counts().host_peak == 2 * ONE
    assert offload.counts().device == 0


def test_a_limit_below_one_checkpoint_is_refused_with_the_arithmetic() -> None:
    with held(deferring(ONE - 1)), pytest.raises(SequenceParallelConfigError, match=f"{ONE - 1} bytes.*{ONE} bytes"):
        Stack(non_reentrant)(example())


@pytest.mark.parametrize("each", EACH)
def test_a_tensor_that_is_changed_on_its_way_is_refused_in_words(each: Through) -> None:
    def changing(x: Tensor) -> Tensor:
        y = each(torch.sin, x)
        with torch.no_grad():
            x.add_(1)
        return each(torch.cos, y)

    with held(deferring()), pytest.raises(RuntimeError, match="changed in place"):
        changing(example() * 1).sum().backward()


def test_a_tensor_that_is_changed_when_it_has_left_is_as_it_was() -> None:
    x = example()
    with held(deferring()):
        first = x * 1
        second = non_reentrant(torch.sin, first)
        third = non_reentrant(torch.sin, second)
        with torch.no_grad():
            first.zero_()
        third.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, x.sin().cos() * x.cos())


@pytest.mark.parametrize("keep", [False, True], ids=["full", "keep_attention"])
@pytest.mark.parametrize("each", EACH)
def test_a_graph_that_is_retained_runs_backward_twice(each: Through, keep: bool) -> None:
    def twice(loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    model, offload = Stack(each), deferring()
    with held(None, keep=keep):
        expected = trained(model, backward=twice)
    with held(offload, keep=keep):
        assert same(trained(model, backward=twice), expected)
    assert offload.counts().host == 0
    assert copies_of(offload).faults == []


@pytest.mark.parametrize("each", EACH)
def test_a_backward_pass_in_another_thread_finds_them(each: Through) -> None:
    def elsewhere(loss: Tensor) -> None:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    model = Stack(each)
    with held(None):
        expected = trained(model)
    with held(deferring()):
        assert same(trained(model, backward=elsewhere), expected)


@pytest.mark.parametrize("each", EACH)
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_exception_leaves_nothing_on_the_host(each: Through, when: str) -> None:
    class BrokenError(Exception):
        pass

    def fail() -> None:
        if torch._C._current_graph_task_id() != -1 or when == "forward":
            raise BrokenError

    offload, model = deferring(), Stack(each)
    with held(None):
        expected = trained(model)
    with held(offload):
        model.layers[2].look = fail
        with pytest.raises(BrokenError):
            trained(model)
        model.layers[2].look = lambda: None
        gc.collect()
        assert offload.counts().host == 0
        assert same(trained(model), expected)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert copies_of(offload).faults == []


@pytest.mark.parametrize("each", EACH)
def test_passes_without_gradients_move_nothing(each: Through) -> None:
    offload, model = deferring(), Stack(each)
    with held(offload):
        with torch.no_grad():
            model(example())
        assert offload.counts().stretches == 0
        trained(model)
    assert offload.counts().stretches == len(model.layers)


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
