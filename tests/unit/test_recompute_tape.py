"""Attention kept for a checkpointed stretch, on one rank: retained graphs, dropped ones, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from checkpointed import Storages, Through, by_context, non_reentrant, reentrant
from torch import Tensor
from torch.utils import checkpoint as torch_checkpoint
from torch.utils.checkpoint import checkpoint

from dsp_plugin import Layout, MaskSpec, SequenceParallelGroups
from dsp_plugin.kernels import calls
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.method import Where
from dsp_plugin.patches import recompute as patches
from dsp_plugin.training import recompute
from dsp_plugin.training.recompute import Tape

pytestmark = pytest.mark.timeout(120)


def attend(q: Tensor, k: Tensor, v: Tensor, method: str = "ring", **settings: Any) -> Tensor:
    """Attention of the whole sequence, by the table."""
    attention = METHODS[method].attention
    assert attention is not None
    whole_sequence = Layout("contiguous", q.shape[1], 1)
    groups = SequenceParallelGroups.single()
    what = AttentionSpec(MaskSpec(causal=True), **settings)
    return attention(q, k, v, what=what, where=Where(groups, whole_sequence))


def stretch(x: Tensor) -> Tensor:
    return attend(x.sin(), x.cos(), x.exp()).square().sum()


def example() -> Tensor:
    return torch.randn(1, 5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()


def gradient(function: Callable[[Tensor], Tensor]) -> Tensor:
    x = example()
    function(x).backward()
    assert x.grad is not None
    return x.grad


@pytest.fixture
def patched() -> Iterator[None]:
    """torch's checkpointing keeps attention."""
    release = patches.hold(patches.TORCH, keep=True)
    yield
    release()


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.kind == "softmax"])
def test_every_softmax_method_of_the_table_goes_on_the_tape(method: str) -> None:
    tape, x = Tape(), example()
    with tape.record():
        attend(x, x, x, method)
    assert tape.nbytes() > 0


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("through", [by_context, non_reentrant, reentrant])
def test_a_graph_that_is_retained_can_be_differentiated_again(through: Through) -> None:
    x = example()
    loss = through(stretch, x)
    with calls() as made:
        loss.backward(retain_graph=True)
    assert made.forward == 0
    first, x.grad = x.grad, None
    # The first pass freed what was kept, as ordinary saved tensors are not: the price is one more call.
    with calls() as made:
        loss.backward()
    assert made.forward == 1
    torch.testing.assert_close(x.grad, first, rtol=0, atol=0)
    torch.testing.assert_close(first, gradient(stretch))


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("through", [by_context, non_reentrant, reentrant])
def test_a_loss_that_is_dropped_leaves_nothing_behind(through: Through) -> None:
    """Without a garbage collection: there are no cycles."""
    with Storages() as storages:
        loss = through(stretch, example())
    assert storages.nbytes() > loss.nbytes
    del loss
    assert storages.nbytes() == 0


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("through", [by_context, non_reentrant, reentrant])
def test_evaluation_keeps_nothing(through: Through, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = stretch(example())
    monkeypatch.setattr(recompute, "_make", lambda *_: pytest.fail("a call was put on a tape"))
    with torch.no_grad():
        assert through(stretch, example()) == expected


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("through", [by_context, non_reentrant, reentrant])
def test_output_changed_in_place_is_refused(through: Through) -> None:
    def changing(x: Tensor) -> Tensor:
        return attend(x.sin(), x.cos(), x.exp(), "ulysses").mul_(2).square().sum()

    with pytest.raises(RuntimeError, match=r"modified in place.*recompute='full'"):
        gradient(lambda x: through(changing, x))


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize(
    ("through", "tokens", "message"),
    [
        (by_context, (4,), "first called it with"),
        (non_reentrant, (4,), "first called it with"),
        (reentrant, (4,), "first called it with"),
        # The others stop before a call that nobody needs.
        (reentrant, (5, 5), "more attention calls"),
    ],
)
def test_control_flow_that_changes_is_refused(through: Through, tokens: tuple[int, ...], message: str) -> None:
    upcoming = iter([(5,), tokens])

    def changing(x: Tensor) -> Tensor:
        return sum((stretch(x[:, :count]) for count in next(upcoming)), torch.zeros(()))

    with pytest.raises(RuntimeError, match=message):
        gradient(lambda x: through(changing, x))


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("way", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_dropout_stays_that_of_the_forward_pass_even_where_random_state_does_not(way: dict[str, bool]) -> None:
    def dropping(x: Tensor) -> Tensor:
        seed = int(torch.randint(2**62, ()))
        return attend(x.sin(), x.cos(), x.exp(), dropout_p=0.5, dropout_seed=seed).square().sum()

    torch.manual_seed(5)
    expected = gradient(dropping)
    torch.manual_seed(5)
    found = gradient(lambda x: checkpoint(dropping, x, preserve_rng_state=False, **way))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("patched")
def test_contexts_of_the_user_and_of_debugging_stay() -> None:
    entered: list[str] = []

    @contextmanager
    def enter(name: str) -> Iterator[None]:
        entered.append(name)
        yield

    def contexts() -> Any:
        return enter("first"), enter("again")

    for settings in ({"context_fn": contexts}, {"debug": True}):
        with calls() as made:
            found = gradient(partial(checkpoint, stretch, use_reentrant=False, **settings))
        assert made.forward == 2
        torch.testing.assert_close(found, gradient(stretch))
    assert entered == ["first", "again"]


def test_torch_is_as_it_was_when_the_last_owner_releases_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Sharded models of other tests, which nobody has taken the hooks off, are owners too.
    monkeypatch.setattr(patches, "_holders", Counter())
    patches.TORCH.revert()

    def upstream() -> tuple[Any, Any]:
        return torch_checkpoint.CheckpointFunction.forward, torch_checkpoint._checkpoint_without_reentrant_generator

    before = upstream()
    first, second = patches.hold(patches.TORCH, keep=True), patches.hold(patches.TORCH, keep=True)
    assert all(ours is not theirs for ours, theirs in zip(upstream(), before, strict=True))
    first()
    first()
    assert patches.TORCH.applied
    second()
    assert upstream() == before
    assert not patches.TORCH.applied
