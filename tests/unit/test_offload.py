"""Checkpoints that wait in host memory: where their bytes are when, that they come back unchanged, what is refused."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from checkpointed import WAYS, Through, non_reentrant
from deferred_copies import copies_of, deferring
from offloaded_stack import EACH, ONE, Stack, example, held, same, trained
from torch import Tensor

from dsp_plugin import SequenceParallelConfigError

pytestmark = pytest.mark.timeout(120)


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
