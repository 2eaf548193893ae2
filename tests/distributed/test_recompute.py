"""Checkpointed stretches are recomputed without attention: what is computed, sent and kept, by method and by way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dsp_plugin import Layout, MaskSpec, SequenceParallelConfig, SequenceParallelGroups, ledger
from dsp_plugin.kernels import calls
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.method import Where
from dsp_plugin.methods.ulysses import head_partition
from dsp_plugin.patches import recompute as patches
from dsp_plugin.spawn import spawn
from dsp_plugin.training import recompute
from dsp_plugin.training.recompute import Tape, keep_attention

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

# Method -> ranks, Ulysses size, layout.
WORLDS: dict[str, tuple[int, int, Any]] = {
    "ring": (3, 1, "zigzag"),
    "usp": (4, 2, "zigzag"),
    "lightseq": (4, 1, "contiguous"),
    "ulysses": (2, 2, "contiguous"),
}
BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM, DEPTH = 2, 24, 6, 2, 4, 2
ODD_LENGTH = 13
WIDTH = HEADS * HEAD_DIM


def build(method: str) -> SequenceParallelGroups:
    size, ulysses, _ = WORLDS[method]
    sizes = {"ulysses_size": ulysses, "ring_size": size // ulysses}
    return SequenceParallelGroups.build(SequenceParallelConfig(method=method, size=size, **sizes))


class Layer(nn.Module):
    """A transformer layer with dropout of attention weights and of activations."""

    def __init__(self, method: str, groups: SequenceParallelGroups, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.method, self.groups, self.dropout = method, groups, dropout

    def forward(self, x_BnC: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BnC).unflatten(-1, (-1, HEAD_DIM)).split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        # Drawn outside of attention, so that recomputation draws as many numbers as the first run did.
        seed = int(torch.randint(2**62, ()))
        attention = METHODS[self.method].attention
        assert attention is not None
        out = attention(
            q,
            k,
            v,
            what=AttentionSpec(
                MaskSpec(causal=True), dropout_p=self.dropout, dropout_seed=seed if self.dropout else None
            ),
            where=Where(self.groups, Layout(WORLDS[self.method][2], LENGTH, self.groups.sp.size)),
        )
        x_BnC = x_BnC + F.dropout(self.out(out.flatten(2)), 0.2)
        return x_BnC + F.dropout(self.mlp(x_BnC), 0.2)


Through = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def whole(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def reentrant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=True)


def non_reentrant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False)


def by_context(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False, context_fn=keep_attention)


# Name -> how the whole stack is called, how each layer is, and whether torch is patched.
WAYS: dict[str, tuple[Through, Through, bool]] = {
    "context function": (whole, by_context, False),
    "non-reentrant": (whole, non_reentrant, True),
    "reentrant": (whole, reentrant, True),
    "one stretch, non-reentrant": (non_reentrant, whole, True),
    "one stretch, reentrant": (reentrant, whole, True),
    "nested, both non-reentrant": (non_reentrant, non_reentrant, True),
    "nested, both reentrant": (reentrant, reentrant, True),
    "nested, outer reentrant": (reentrant, non_reentrant, True),
    "nested, inner reentrant": (non_reentrant, reentrant, True),
    "nested, context functions": (by_context, by_context, False),
}
ORDINARY: dict[str, tuple[Through, Through, bool]] = {
    "ordinary non-reentrant": (whole, non_reentrant, False),
    "ordinary reentrant": (whole, reentrant, False),
}


def train(method: str, groups: SequenceParallelGroups, way: tuple[Through, Through, bool]) -> dict[str, Any]:
    """Two forward passes, then their backward passes: gradients, and what happened in the backward passes."""
    around_all, around_each, patched = way
    torch.manual_seed(1)
    layers = nn.ModuleList(Layer(method, groups, 0.25) for _ in range(DEPTH)).double()
    layout = Layout(WORLDS[method][2], LENGTH, groups.sp.size)
    batches = torch.randn(2, BATCH, LENGTH, WIDTH, dtype=torch.float64)

    def stack(x: Tensor) -> Tensor:
        for layer in layers:
            x = around_each(layer, x)
        return x

    with ExitStack() as stack_of_patches:
        if patched:
            stack_of_patches.callback(patches.hold(patches.TORCH))
        inputs = [layout.shard(x, 1, groups.sp.rank).clone().requires_grad_() for x in batches]
        with ledger() as sent, calls() as made:
            losses = [around_all(stack, x).square().sum() for x in inputs]
        forward = (made.forward, sent.bytes(phase="forward"))
        with ledger() as sent, calls() as made:
            for loss in losses:
                loss.backward()
    return {
        "gradients": [*(x.grad for x in inputs), *(parameter.grad for parameter in layers.parameters())],
        "losses": [loss.item() for loss in losses],
        "forward": forward,
        "again": (made.forward, sent.bytes(phase="forward")),
        "backward": (made.backward, sent.bytes(phase="backward")),
        "random": torch.rand(()).item(),
    }


def run(method: str) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[int, int, int, int]]]:
    """All that the tests of a method ask for, in one world."""
    groups = build(method)
    ways = {"none": (whole, whole, False), **ORDINARY, **WAYS}
    return {name: train(method, groups, way) for name, way in ways.items()}, kept_bytes(method, groups)


@cache
def results(method: str) -> list[Any]:
    return spawn(run, WORLDS[method][0], method, timeout=90)


def runs(method: str) -> list[dict[str, dict[str, Any]]]:
    """What each rank found, by way."""
    return [by_way for by_way, _ in results(method)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", WORLDS)
def test_backward_computes_and_sends_no_attention_again(method: str, way: str) -> None:
    for found in runs(method):
        assert found["none"]["forward"] == found[way]["forward"]
        assert min(found[way]["forward"]) > 0
        assert found[way]["again"] == (0, 0)
        assert found[way]["backward"] == found["none"]["backward"]


@pytest.mark.parametrize("way", ORDINARY)
@pytest.mark.parametrize("method", WORLDS)
def test_ordinary_checkpointing_does_all_of_it_again(method: str, way: str) -> None:
    for found in runs(method):
        assert found[way]["again"] == found["none"]["forward"]


@pytest.mark.parametrize("way", [*WAYS, *ORDINARY])
@pytest.mark.parametrize("method", WORLDS)
def test_same_gradients_and_random_numbers_as_without_checkpointing(method: str, way: str) -> None:
    for found in runs(method):
        assert found[way]["losses"] == found["none"]["losses"]
        assert found[way]["random"] == found["none"]["random"]
        for ours, theirs in zip(found[way]["gradients"], found["none"]["gradients"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


SHAPES = {
    "grouped heads": (6, 2, 8, 8),
    "uneven heads, a group cut between ranks": (5, 1, 8, 8),
    "a key/value head for each query head": (7, 7, 4, 4),
    "values of another width": (4, 2, 8, 6),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def formula(method: str, groups: SequenceParallelGroups, shape: tuple[int, ...], length: int, dtype: Any) -> int:
    """As in the docstring of `dsp_plugin.training.recompute`."""
    heads, kv_heads, d, dv = shape
    layout = Layout(WORLDS[method][2], length, groups.sp.size)
    e, w = dtype.itemsize, max(dtype.itemsize, 4)
    n = layout.sizes[groups.sp.rank]
    if method in ("ring", "lightseq"):
        return BATCH * n * heads * (dv * e + w)
    part = head_partition(heads, kv_heads, groups.ulysses.size)
    h, k = len(part.queries[groups.ulysses.rank]), len(part.keys[groups.ulysses.rank])
    gathered = sum(layout.sizes[groups.sp.ranks.index(rank)] for rank in groups.ulysses.ranks)
    return BATCH * gathered * (h * (d * e + dv * e + w) + k * (d + dv) * e) + BATCH * n * heads * dv * e


class Storages(TorchDispatchMode):
    """Sees every storage that operations of this thread make, also those whose tensors are out of Python's sight."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def nbytes(self) -> int:
        """Bytes of those that are still there."""
        return sum(nbytes for storage, nbytes in self._found.values() if not storage.expired())

    def settled(self, expected: int) -> int:
        """The same, once gloo's threads have let go of what they sent."""
        for _ in range(100):
            if self.nbytes() == expected:
                break
            time.sleep(0.02)
        return self.nbytes()


def kept_bytes(method: str, groups: SequenceParallelGroups) -> dict[str, tuple[int, int, int, int]]:
    """By shape and dtype: the formula, the tape's own account, what the process holds, and what after backward."""
    attention = METHODS[method].attention
    assert attention is not None
    layout = Layout(WORLDS[method][2], ODD_LENGTH, groups.sp.size)
    # The math kernel pads nothing.
    settings = {"what": AttentionSpec(MaskSpec(causal=True), kernel="math"), "where": Where(groups, layout)}
    found = {}
    for name, dtype in [*product(SHAPES, DTYPES[:1]), *product(list(SHAPES)[:1], DTYPES[1:])]:
        shape = heads, kv_heads, d, dv = SHAPES[name]
        ends = ((heads, d), (kv_heads, d), (kv_heads, dv))
        inputs = [torch.randn(BATCH, layout.sizes[groups.sp.rank], *end, dtype=dtype) for end in ends]
        tape = Tape()
        with Storages() as storages, tape.record():
            attention(*(x + 0 for x in inputs), **settings)
        kept = tape.nbytes()
        held = storages.settled(kept)
        with tape.replay():
            attention(*(x.requires_grad_() for x in inputs), **settings).sum().backward()
        expected = formula(method, groups, shape, ODD_LENGTH, dtype)
        found[f"{name}, {dtype}"] = (expected, kept, held, tape.nbytes() + storages.settled(0))
    return found


@pytest.mark.parametrize("method", WORLDS)
def test_bytes_kept_are_those_of_the_formula_and_of_the_process(method: str) -> None:
    for _, found in results(method):
        assert len(found) == len(SHAPES) + len(DTYPES) - 1
        for name, (expected, kept, held, after) in found.items():
            assert kept == expected > 0, name
            assert held == kept, name
            assert after == 0, name


# What follows needs no other ranks.


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
    release = patches.hold(patches.TORCH)
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


def test_torch_is_as_it_was_when_the_last_owner_releases_it() -> None:
    def upstream() -> tuple[Any, Any]:
        return torch_checkpoint.CheckpointFunction.forward, torch_checkpoint._checkpoint_without_reentrant_generator

    before = upstream()
    first, second = patches.hold(patches.TORCH), patches.hold(patches.TORCH)
    assert all(ours is not theirs for ours, theirs in zip(upstream(), before, strict=True))
    first()
    first()
    assert patches.TORCH.applied
    second()
    assert upstream() == before
    assert not patches.TORCH.applied
