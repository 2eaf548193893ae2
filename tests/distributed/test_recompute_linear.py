"""Linear attention in checkpointed stretches: what is computed, sent and kept, by exchange, decay and documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from itertools import pairwise, product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from checkpointed import ORDINARY, Storages, by_context, non_reentrant, reentrant, whole
from torch import Tensor, nn

from dsp_plugin import Layout, SequenceParallelConfig, SequenceParallelGroups, ledger
from dsp_plugin.kernels import calls
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.method import Where
from dsp_plugin.methods.state_exchange import EXCHANGES
from dsp_plugin.patches import recompute as patches
from dsp_plugin.spawn import spawn
from dsp_plugin.training.recompute import Tape, on_tape

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

SIZES = (1, 2, 3)
BATCH, LENGTH, HEADS, QUERY_HEADS, KEY_DIM, VALUE_DIM, DEPTH = 2, 22, 4, 2, 4, 6, 2
WIDTH = HEADS * VALUE_DIM
# One border inside a shard, one between shards of two, and none on the last rank of three.
DOCUMENTS = {"one document": None, "packed": (0, 5, 11, LENGTH)}


class Case(NamedTuple):
    decay: str
    exchange: str
    documents: str
    layout: Any = "contiguous"
    causal: bool = True


CASES = [Case(*case) for case in product(("head", "gated-delta"), EXCHANGES, DOCUMENTS)]
CASES += [Case("scalar", "ring", "one document", "zigzag")]
CASES += [Case("none", "auto", documents, causal=False) for documents in DOCUMENTS]

# Name -> how a layer is called, and whether torch is patched.
WAYS = {
    "context function": (by_context, False),
    "non-reentrant": (non_reentrant, True),
    "reentrant": (reentrant, True),
}


def build(size: int) -> SequenceParallelGroups:
    return SequenceParallelGroups.build(SequenceParallelConfig(method="lasp", size=size))


def attend(*inputs: Tensor | None, **settings: Any) -> Any:
    """LASP by the table."""
    attention = METHODS["lasp"].attention
    assert attention is not None
    return attention(*inputs, **settings)


class Layer(nn.Module):
    """A layer that trains all there is to train: projections, gates, a decay per head, and the initial state."""

    def __init__(self, case: Case, groups: SequenceParallelGroups) -> None:
        super().__init__()
        self.q, self.k = (nn.Linear(WIDTH, QUERY_HEADS * KEY_DIM) for _ in range(2))
        self.v, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gates = nn.Linear(WIDTH, 2 * HEADS)
        self.decay = nn.Parameter(torch.randn(HEADS))
        self.initial_state = nn.Parameter(torch.randn(BATCH, HEADS, KEY_DIM, VALUE_DIM))
        self.case, self.groups = case, groups

    def forward(self, x_BnC: Tensor) -> Tensor:
        q, k = (project(x_BnC).unflatten(-1, (QUERY_HEADS, KEY_DIM)) for project in (self.q, self.k))
        v = self.v(x_BnC).unflatten(-1, (HEADS, VALUE_DIM))
        decay, rate = self.gates(x_BnC).chunk(2, -1)
        settings = {
            "where": Where(self.groups, Layout(self.case.layout, LENGTH, self.groups.sp.size)),
            "exchange": self.case.exchange,
            "cu_seqlens": DOCUMENTS[self.case.documents],
            "causal": self.case.causal,
            "output_final_state": self.case.causal,
        }
        if not self.case.causal:
            return x_BnC + self.out(attend(q, k, v, **settings).flatten(2))
        if self.case.decay == "head":
            out, state = attend(q, k, v, -F.softplus(self.decay), None, self.initial_state, **settings)
        elif self.case.decay == "scalar":
            out, state = attend(q, k, v, -F.softplus(decay), initial_state=self.initial_state, **settings)
        else:
            gates = {"g": -F.softplus(decay), "beta": rate.sigmoid()}
            out, state = attend(q, F.normalize(k, dim=-1), v, initial_state=self.initial_state, **gates, **settings)
        return x_BnC + self.out(out.flatten(2)) + state.mean()


def train(case: Case, groups: SequenceParallelGroups, through: Any, patched: bool) -> dict[str, Any]:
    """A forward and a backward pass: gradients, and what happened in the backward pass."""
    torch.manual_seed(1)
    layers = nn.ModuleList(Layer(case, groups) for _ in range(DEPTH)).double()
    layout = Layout(case.layout, LENGTH, groups.sp.size)
    x = layout.shard(torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64), 1, groups.sp.rank).clone()
    x.requires_grad_()
    with ExitStack() as stack:
        if patched:
            stack.callback(patches.hold(patches.TORCH, keep=True))
        with ledger() as sent, calls() as made:
            y = x
            for layer in layers:
                y = through(layer, y)
            loss = y.square().sum()
        forward = (made.forward, sent.bytes(phase="forward"))
        with ledger() as sent, calls() as made:
            loss.backward()
    return {
        "gradients": [x.grad, *(parameter.grad for parameter in layers.parameters())],
        "loss": loss.item(),
        "forward": forward,
        "again": (made.forward, sent.bytes(phase="forward")),
        "backward": (made.backward, sent.bytes(phase="backward")),
    }


def run(size: int) -> tuple[dict[Case, dict[str, dict[str, Any]]], dict[str, tuple[int, int, int, int]]]:
    """All that the tests ask for, in one world."""
    groups = build(size)
    ways = {"none": (whole, False), **{name: way[1:] for name, way in ORDINARY.items()}, **WAYS}
    trained = {case: {name: train(case, groups, *way) for name, way in ways.items()} for case in CASES}
    return trained, kept_bytes(groups)


@cache
def results(size: int) -> list[Any]:
    return spawn(run, size, size, timeout=100)


def runs(size: int) -> Iterator[dict[str, dict[str, Any]]]:
    """What each rank found, by way."""
    for by_case, _ in results(size):
        assert list(by_case) == CASES
        yield from by_case.values()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
def test_backward_computes_and_sends_nothing_of_the_forward_pass(size: int, way: str) -> None:
    for found in runs(size):
        assert found[way]["forward"] == found["none"]["forward"]
        assert found[way]["forward"][0] == DEPTH
        assert found[way]["again"] == (0, 0)
        assert found[way]["backward"] == found["none"]["backward"]
        assert found[way]["backward"][0] == DEPTH


@pytest.mark.parametrize("size", SIZES[1:])
def test_there_is_something_to_send(size: int) -> None:
    by_rank = [list(by_case.values()) for by_case, _ in results(size)]
    for case, *ranks in zip(CASES, *by_rank, strict=True):
        if not case.causal and case.documents == "packed" and size == 2:
            # The only border within the sequence that a document could cross is one of documents.
            continue
        assert sum(found["none"]["forward"][1] for found in ranks) > 0
        assert sum(found["none"]["backward"][1] for found in ranks) > 0


@pytest.mark.parametrize("way", ORDINARY)
@pytest.mark.parametrize("size", SIZES)
def test_ordinary_checkpointing_does_all_of_it_again(size: int, way: str) -> None:
    for found in runs(size):
        assert found[way]["again"] == found["none"]["forward"]


@pytest.mark.parametrize("way", [*WAYS, *ORDINARY])
@pytest.mark.parametrize("size", SIZES)
def test_same_gradients_as_without_checkpointing(size: int, way: str) -> None:
    for found in runs(size):
        assert found[way]["loss"] == found["none"]["loss"]
        for ours, theirs in zip(found[way]["gradients"], found["none"]["gradients"], strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


DTYPES = [torch.float64, torch.float32, torch.bfloat16]
DECAYS = ("none", "head", "scalar", "vector", "delta", "gated-delta", "kda")


def example(decay: str, n: int, dtype: torch.dtype) -> list[Tensor | None]:
    """q, k, v, g and beta of ``n`` tokens."""
    gates = {"head": (HEADS,), "vector": (BATCH, n, HEADS, KEY_DIM), "kda": (BATCH, n, HEADS, KEY_DIM)}
    gates |= dict.fromkeys(("scalar", "gated-delta"), (BATCH, n, HEADS))
    q, k = (torch.randn(BATCH, n, QUERY_HEADS, KEY_DIM, dtype=dtype) for _ in range(2))
    v = torch.randn(BATCH, n, HEADS, VALUE_DIM, dtype=dtype)
    g = -torch.rand(gates[decay], dtype=dtype) if decay in gates else None
    beta = torch.rand(BATCH, n, HEADS, dtype=dtype) if decay in ("delta", "gated-delta", "kda") else None
    return [q, F.normalize(k, dim=-1), v, g, beta]


def formula(case: Case, groups: SequenceParallelGroups, dtype: torch.dtype, final_state: bool) -> int:
    """As in the docstring of `dsp_plugin.training.recompute`."""
    size, rank = groups.lasp.size, groups.lasp.rank
    n = Layout(case.layout, LENGTH, size).sizes[rank]
    e, w = dtype.itemsize, max(dtype.itemsize, 4)
    out, state = BATCH * n * HEADS * VALUE_DIM * e, BATCH * HEADS * KEY_DIM * VALUE_DIM * w
    if not case.causal:
        (own,) = Layout(case.layout, LENGTH, size).spans(rank)
        documents = pairwise(DOCUMENTS[case.documents] or (0, LENGTH))
        return out + state * sum(start < own.stop and own.start < stop for start, stop in documents)
    kept = out + state * (final_state + (rank > 0))
    if case.exchange == "allgather" and size > 1:
        entries = {"scalar": 1, "vector": KEY_DIM}.get(case.decay, KEY_DIM**2) * BATCH * HEADS
        if case.decay == "head":
            entries = HEADS
        elif case.decay == "none":
            entries = 0
        kept += size * entries * w
    if case.layout == "zigzag" and size > 1:
        token = 2 * QUERY_HEADS * KEY_DIM + HEADS * VALUE_DIM + HEADS * (case.decay == "scalar")
        kept += BATCH * n * token * e
    return kept


def kept_bytes(groups: SequenceParallelGroups) -> dict[str, tuple[int, int, int, int]]:
    """By case and dtype: the formula, the tape's own account, what the process holds, and what after backward."""
    found = {}
    cases = [Case(*case) for case in product(DECAYS, EXCHANGES, DOCUMENTS)]
    cases += [case for case in CASES if case not in cases]
    runs = [*product(cases, DTYPES[:1], [False]), *product(CASES, DTYPES[1:], [False, True])]
    for case, dtype, final in runs:
        final = final and case.causal
        layout = Layout(case.layout, LENGTH, groups.lasp.size)
        inputs = example(case.decay, layout.sizes[groups.lasp.rank], dtype)
        settings = {
            "where": Where(groups, layout),
            "exchange": case.exchange,
            "cu_seqlens": DOCUMENTS[case.documents],
            "causal": case.causal,
            "output_final_state": final,
        }
        # Where tokens go in another layout is computed once.
        attend(*inputs, **settings)
        tape = Tape()
        with Storages() as storages, tape.record():
            attend(*(None if x is None else x + 0 for x in inputs), **settings)
        kept = tape.nbytes()
        held = storages.settled(kept)
        with tape.replay():
            outputs = attend(*(None if x is None else x.requires_grad_() for x in inputs), **settings)
        outputs = outputs if final else (outputs,)
        torch.autograd.backward([x.sum() for x in outputs])
        del outputs
        name = f"{case}, {dtype}, final state {final}"
        found[name] = (formula(case, groups, dtype, final), kept, held, tape.nbytes() + storages.settled(0))
    return found


@pytest.mark.parametrize("size", SIZES)
def test_bytes_kept_are_those_of_the_formula_and_of_the_process(size: int) -> None:
    wrong = {
        (rank, name): bytes_
        for rank, (_, found) in enumerate(results(size))
        for name, bytes_ in found.items()
        if not (0 < bytes_[0] == bytes_[1] == bytes_[2] and bytes_[3] == 0)
    }
    assert not wrong


# What follows needs no other ranks.


Function = Callable[..., Any]


def mixing(a: Tensor, b: Tensor | None = None, g: Tensor | None = None, *, power: int = 1) -> tuple[Tensor, Tensor]:
    """Two outputs of inputs that may be missing."""
    total = a if b is None else a + b.sin()
    return total.exp() ** power, (total if g is None else total * g).cos()


def gradients(function: Function, inputs: list[Tensor | None], outputs: tuple[int, ...]) -> list[Tensor | None]:
    """Those of the inputs, through a checkpointed stretch, when only some of the outputs are used."""
    leaves = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
    present = [x for x in leaves if x is not None]

    def stretch(first: Tensor) -> Tensor:
        results = function(first * 2, *(None if x is None else x * 2 for x in leaves[1:]))
        return torch.stack([*(results[place].square().sum() for place in outputs), *(x.sum() for x in present)]).sum()

    by_context(stretch, present[0]).backward()
    return [None if x is None else x.grad for x in leaves]


# What an input is.
KINDS = ("trained", "frozen", "missing")


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["the first", "the second", "both"])
@pytest.mark.parametrize(
    "kinds", [kinds for kinds in product(KINDS[:2], KINDS, KINDS) if "trained" in kinds], ids=", ".join
)
def test_any_function_of_tensors_that_may_be_none(used: tuple[int, ...], kinds: tuple[str, ...]) -> None:
    torch.manual_seed(2)
    inputs = [
        None if kind == "missing" else torch.randn(3, dtype=torch.float64).requires_grad_(kind == "trained")
        for kind in kinds
    ]
    expected = gradients(mixing, inputs, used)
    found = gradients(on_tape(mixing), inputs, used)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_inputs_by_keyword_are_inputs_and_settings_are_not() -> None:
    x = torch.randn(3, dtype=torch.float64).requires_grad_()
    tape, attention = Tape(), on_tape(mixing)
    with tape.record():
        attention(x, g=x, power=2)
    with tape.replay():
        first, second = attention(x + 0, g=x + 0, power=2)
    found = torch.autograd.grad((first.sum(), second.sum()), x)
    expected = torch.autograd.grad(tuple(y.sum() for y in mixing(x, g=x, power=2)), x)
    torch.testing.assert_close(found, expected)


def test_an_input_that_is_none_only_once_is_refused() -> None:
    x, tape, attention = torch.randn(3), Tape(), on_tape(mixing)
    with tape.record():
        attention(x)
    with tape.replay(), pytest.raises(RuntimeError, match=r"\[.*, None, None\].*must not depend on anything"):
        attention(x, g=x)


class Spied(torch.autograd.Function):
    """Two copies, telling which of them had a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seen: list[tuple[bool, ...]]) -> tuple[Tensor, Tensor]:
        ctx.seen = seen
        ctx.set_materialize_grads(False)
        return x.clone(), x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        ctx.seen.append(tuple(grad is not None for grad in grads))
        return next(grad for grad in grads if grad is not None), None


class Dropped(torch.autograd.Function):
    """The identity, with no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


def test_outputs_without_a_gradient_cost_no_backward_pass() -> None:
    seen: list[tuple[bool, ...]] = []

    def spied(x: Tensor) -> tuple[Tensor, Tensor]:
        return Spied.apply(x, seen)

    def stretch(x: Tensor, used: Callable[[Tensor], Tensor]) -> Tensor:
        return used(on_tape(spied)(x * 2)[1]).sum() + x.sum()

    x = torch.randn(3, requires_grad=True)
    by_context(lambda x: stretch(x, torch.sin), x).backward()
    assert seen == [(False, True)]
    by_context(lambda x: stretch(x, Dropped.apply), x).backward()
    assert seen == [(False, True)]
