"""Claims about LASP: every decay x exchange x layout x mask, all against the token recurrence in fp64 and the formula.

Every case compares the output, the states after every rank's last token and all gradients, and the bytes that left each
rank, see `dsp_plugin.verification`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, product
from typing import Any

import pytest
import torch
from torch import Tensor

from dsp_plugin import Layout, MaskSpec, SequenceParallelConfig, SequenceParallelConfigError, SequenceParallelGroups
from dsp_plugin.comm import ledger
from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.layout import shard_sizes
from dsp_plugin.methods import METHODS, WireBytes, Workload, lasp, state_exchange
from dsp_plugin.methods.method import Where
from dsp_plugin.methods.state_exchange import EXCHANGES, scan_blocks
from dsp_plugin.spawn import RankFailure, spawn
from dsp_plugin.verification import Case, CaseResult, default_cases, refusal, run_case, run_cases
from dsp_plugin.verification.linear import draw

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

SIZES = [1, 2, 3, 4, 8]
CAUSAL = MaskSpec(causal=True)


def verify(size: int, cases: list[Case], timeout: float = 200) -> list[CaseResult]:
    """Run the cases in one world and complain about all that fail at once."""
    results = spawn(run_cases, size, cases, timeout=timeout)[0]
    failures = [f"{r.case.describe()}: {'; '.join(r.failures())}" for r in results if r.refused is None and not r.ok]
    assert not failures, "\n".join(failures)
    return results


def build(size: int, debug: bool = False) -> SequenceParallelGroups:
    return SequenceParallelGroups.build(SequenceParallelConfig(method="lasp", size=size, debug=debug))


@pytest.mark.parametrize("size", [*SIZES[:-1], pytest.param(SIZES[-1], marks=pytest.mark.matrix)])
def test_every_situation_is_exact_in_output_states_gradients_and_bytes(size: int) -> None:
    results = verify(size, default_cases("lasp", size))
    assert all(result.refused is None for result in results)
    for result in results:
        names = {error.name for error in result.errors}
        case = result.case
        assert names >= {"out", "dq", "dk", "dv"}
        assert ("dg" in names) == (case.decay not in ("none", "delta"))
        assert ("dbeta" in names) == (case.decay in ("delta", "gated-delta", "kda"))
        assert ({"final state", "dinitial_state"} <= names) == case.states
        assert len(result.wire) == size


@pytest.mark.parametrize("states", [False, True])
def test_every_decay_with_every_exchange(states: bool) -> None:
    """The whole product, on shards of unlike sizes that several documents share and cross."""
    cut = {"sizes": (9, 2, 26), "mask": MaskSpec(causal=True, cu_seqlens=(0, 4, 5, 9, 30, 37)), "value_dim": 20}
    cases = [
        Case("lasp", 3, decay=decay, exchange=exchange, states=states, seed=seed, heads=4, **shape)
        for seed, (decay, exchange) in enumerate(product(DECAYS, ("auto", *EXCHANGES)))
        for shape in ({"mask": CAUSAL}, cut)
    ]
    assert all(result.refused is None for result in verify(3, cases))


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.matrix) for dtype in (torch.float64, torch.float16))],
    ids=str,
)
def test_other_dtypes(dtype: torch.dtype) -> None:
    """fp64 to 1e-12; 16 bits no further from the oracle than 1.5 times the unsharded run."""
    verify(3, default_cases("lasp", 3, {"dtype": dtype, "length": 73, "seed": 2}))


EMPTY_SHARDS = [(0, 0, 7, 0), (7, 0, 0, 0), (0, 0, 0, 7), (0, 3, 0, 4), (1, 0, 0, 1)]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_ranks_that_hold_nothing(exchange: str) -> None:
    """They pass the state on, and what they return and differentiate is empty; a single token, too, is a sequence."""
    cases = [
        Case("lasp", 4, length=sum(sizes), sizes=sizes, decay=decay, exchange=exchange, mask=mask, states=True)
        for decay in DECAYS
        for sizes in EMPTY_SHARDS
        for mask in (CAUSAL, MaskSpec(causal=True, cu_seqlens=(0, 1, sum(sizes))))
    ]
    cases += [Case("lasp", 4, length=length, mask=CAUSAL, exchange=exchange, decay="kda") for length in (1, 2, 3)]
    # Bidirectional: a document that one rank holds all of is not sent, and workloads know nothing of sizes.
    crossing = [sizes for sizes in EMPTY_SHARDS if max(sizes) < sum(sizes)]
    cases += [Case("lasp", 4, length=sum(sizes), sizes=sizes, exchange=exchange) for sizes in crossing]
    assert all(result.refused is None for result in verify(4, cases))


UNUSUAL: dict[str, dict[str, Any]] = {
    "a document for every token": {"length": 9, "mask": MaskSpec(True, None, tuple(range(10)))},
    "a document for every token, both ways": {"length": 9, "mask": MaskSpec(False, None, tuple(range(10)))},
    "documents that end where shards do": {"length": 16, "mask": MaskSpec(True, None, (0, 4, 8, 16))},
    "documents that end where shards do, both ways": {"length": 16, "mask": MaskSpec(False, None, (0, 4, 8, 16))},
    "empty and tiny documents": {"length": 25, "mask": MaskSpec(True, None, (0, 0, 4, 4, 5, 7, 25, 25))},
    "one row": {"batch": 1, "length": 41, "mask": CAUSAL},
    "one head, one dim": {"heads": 1, "kv_heads": 1, "head_dim": 1, "value_dim": 1, "mask": CAUSAL},
    "chunks and a remainder": {"length": 300, "batch": 1, "mask": MaskSpec(True, None, (0, 150, 151, 300))},
}


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.matrix)])
def test_unusual_sequences(half: int) -> None:
    cases = [
        Case(
            "lasp", 4, decay=decay, exchange=EXCHANGES[turn % 3], states=fields["mask"].causal, layout=layout, **fields
        )
        for turn, (fields, decay) in enumerate(product(UNUSUAL.values(), DECAYS))
        for place, layout in enumerate(("contiguous", "zigzag"))
        if (turn + place) % 2 == half and (fields["mask"].causal or decay == "none")
    ]
    assert all(result.refused is None for result in verify(4, cases))


def _scanned_by_column(size: int) -> list[CaseResult]:
    """The scan of a network on which starting a transfer costs nothing, in as many blocks as there are columns."""
    state_exchange._LATENCY = 1e-12
    assert scan_blocks(1000, 5, size) == (5 if size > 2 else 1)
    masks = (CAUSAL, MaskSpec(causal=True, cu_seqlens=(0, 4, 5, 37)))
    shapes = [(mask, value_dim) for mask in masks for value_dim in (1, 2, 5)]
    return run_cases(
        [
            Case("lasp", size, mask=mask, value_dim=value_dim, decay=decay, exchange="scan", states=True)
            for decay in DECAYS
            for mask, value_dim in shapes
        ]
    )


@pytest.mark.parametrize("size", [pytest.param(3, marks=pytest.mark.matrix), 5])
def test_a_scan_in_any_number_of_blocks(size: int) -> None:
    """More blocks than ranks, as many, and fewer."""
    for result in spawn(_scanned_by_column, size, size, timeout=200)[0]:
        assert result.ok, (result.case.describe(), result.failures())


def test_verify_cuts_states_into_blocks() -> None:
    for size in (3, 4, 8):
        large = [case for case in default_cases("lasp", size) if case.head_dim == 128]
        assert {case.decay for case in large} == {"none", "vector", "kda"}
        for case in large:
            state = case.batch * case.heads * case.head_dim * case.v_dim * case.dtype.itemsize
            assert scan_blocks(state, case.v_dim, size) > 1
        fixed = default_cases("lasp", size, {"head_dim": 16, "mask": "causal"})
        assert all(case.head_dim == 16 for case in fixed)


def _debugged(size: int) -> list[CaseResult]:
    groups = build(size, debug=True)
    masks = {"none": [CAUSAL, MaskSpec(), MaskSpec(cu_seqlens=(0, 5, 37))]}
    cases = [
        Case("lasp", size, decay=decay, exchange=exchange, mask=mask, layout=layout, states=mask.causal)
        for decay, exchange in product(DECAYS, EXCHANGES)
        for mask in masks.get(decay, [CAUSAL])
        for layout in ("contiguous", "zigzag")
    ]
    return [run_case(case, groups) for case in cases]


def test_debug_mode_passes_every_exchange_and_changes_nothing() -> None:
    for result in spawn(_debugged, 3, 3, timeout=200)[0]:
        assert result.ok, (result.case.describe(), result.failures())


def _traffic(size: int, exchange: str) -> dict[str, tuple[dict[str, int], dict[str, int]]]:
    """Calls during the forward pass and during the backward pass, by phase, of every decay and of no mask."""
    groups = build(size)
    cases = {decay: Case("lasp", size, decay=decay, mask=CAUSAL, states=True) for decay in DECAYS}
    return {name: _calls(case, exchange, groups) for name, case in (cases | {"full": Case("lasp", size)}).items()}


def _calls(case: Case, exchange: str, groups: SequenceParallelGroups) -> tuple[dict[str, int], dict[str, int]]:
    layout = case.tokens()
    whole = {"initial_state"} | ({"g"} if case.decay == "head" else set())
    leaves = {
        name: (x if name in whole else layout.shard(x, 1, groups.sp.rank)).clone().requires_grad_()
        for name, x in draw(case).items()
        if name not in ("dout", "dfinal")
    }
    with ledger() as forward:
        out = lasp.attention(**leaves, where=Where(groups, layout), exchange=exchange, causal=case.mask.causal)
    with ledger() as backward:
        out.sum().backward()
    before, after = (
        {phase: log.calls(phase=phase) for phase in ("forward", "backward")} for log in (forward, backward)
    )
    return before, after


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_backward_pass_repeats_no_forward_exchange(exchange: str) -> None:
    for calls in spawn(_traffic, 3, 3, exchange, timeout=60):
        for name, (during_forward, during_backward) in calls.items():
            assert during_forward["backward"] == during_backward["forward"] == 0, name
            assert during_forward["forward"] == during_backward["backward"] > 0, name
            if exchange == "allgather" and name != "full":
                assert during_forward["forward"] == 1


def _attention_with(change: Callable[..., Any]) -> None:
    METHODS["lasp"] = replace(lasp.METHOD, attention=lambda *args, **named: change(lasp.attention, *args, **named))


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _gradient_off(name: str) -> Callable[[int], None]:
    def flaw(rank: int) -> None:
        def change(true: Callable[..., Any], **inputs: Any) -> Any:
            return true(**inputs | {name: _ScaledGradient.apply(inputs[name], 1 + 1e-3 * rank)})

        _attention_with(change)

    return flaw


def _output_off(rank: int) -> None:
    def change(true: Callable[..., Any], **inputs: Any) -> Any:
        out, state = true(**inputs)
        return out * (1 + 1e-4 * rank), state

    _attention_with(change)


def _state_off(rank: int) -> None:
    def change(true: Callable[..., Any], **inputs: Any) -> Any:
        out, state = true(**inputs)
        return out, state + 1e-3 * rank

    _attention_with(change)


def _initial_state_everywhere(rank: int) -> None:
    """Every rank has the gradient that only the first should have."""

    def change(true: Callable[..., Any], **inputs: Any) -> Any:
        out, state = true(**inputs)
        return out + 0 * out.detach() + 1e-3 * rank * (
            inputs["initial_state"] - inputs["initial_state"].detach()
        ).sum(), state

    _attention_with(change)


def _documents_run_together(rank: int) -> None:
    def change(true: Callable[..., Any], **inputs: Any) -> Any:
        return true(**inputs | {"cu_seqlens": (0, inputs["where"].layout.length)})

    _attention_with(change)


def _formula_off(rank: int) -> None:
    def wire_bytes(workload: Workload, of_rank: int) -> WireBytes:
        forward, backward = lasp.wire_bytes(workload, of_rank)
        return WireBytes(forward, backward + 4 * of_rank)

    METHODS["lasp"] = replace(lasp.METHOD, wire_bytes=wire_bytes)


FLAWS: dict[str, tuple[Callable[[int], None], str]] = {
    "output": (_output_off, "out is off"),
    "final state": (_state_off, "final state is off"),
    "initial state's gradient on all ranks": (_initial_state_everywhere, "dinitial_state is off"),
    "documents": (_documents_run_together, "out is off"),
    "bytes": (_formula_off, "rank 1 sent"),
    **{name: (_gradient_off(name), f"d{name} is off") for name in ("q", "k", "v", "beta")},
}


def _broken(flaw: str) -> CaseResult:
    """The result of a method that was broken on purpose."""
    groups = build(2)
    FLAWS[flaw][0](groups.sp.rank)
    mask = MaskSpec(causal=True, cu_seqlens=(0, 20, 37))
    return run_case(Case("lasp", 2, decay="gated-delta", exchange="ring", mask=mask, states=True), groups)


@pytest.mark.parametrize("flaw", FLAWS)
def test_verification_sees_a_flaw_on_one_rank(flaw: str) -> None:
    for result in spawn(_broken, 2, flaw, timeout=60):
        assert not result.ok
        assert any(line.startswith(FLAWS[flaw][1]) for line in result.failures()), result.failures()


def _refused(size: int, case: Case) -> tuple[str | None, int]:
    groups = build(size)
    with ledger() as log:
        result = run_case(case, groups)
    return result.refused, log.calls()


@pytest.mark.parametrize(
    ("fixed", "words"),
    [
        ({"mask": MaskSpec(causal=True, window=(4, 0))}, "linear attention has no window"),
        ({"mask": MaskSpec(), "decay": "scalar"}, "only causal attention has them"),
        ({"mask": MaskSpec(), "states": True}, "only causal attention has them"),
        ({"heads": 5, "kv_heads": 2}, "heads=5 is not a multiple of kv_heads=2"),
        ({"mask": MaskSpec(causal=True, cu_seqlens=(0, 5))}, "last border is 5"),
        ({"dropout": 0.5}, "no weights to drop"),
        ({"kernel": "flash"}, "kernel='flash'"),
        ({"layout": "striped"}, "method lasp takes contiguous, zigzag"),
    ],
)
def test_illegal_cases_are_refused_on_every_rank_before_anything_is_sent(fixed: dict[str, Any], words: str) -> None:
    case = Case("lasp", 3, **{"mask": CAUSAL, **fixed})
    for reason, calls in spawn(_refused, 3, 3, case, timeout=60):
        assert calls == 0
        assert reason is not None
        assert words in reason


def _wrong_shard(size: int) -> None:
    groups = build(size)
    x = torch.randn(1, 2, 2, 4)
    lasp.attention(x, x, x, where=Where(groups, Layout("contiguous", 9, size)))


def test_the_method_itself_refuses_on_every_rank() -> None:
    with pytest.raises(RankFailure) as failure:
        spawn(_wrong_shard, 3, 3, timeout=60)
    assert set(failure.value.errors) == {0, 1, 2}
    for error in failure.value.errors.values():
        assert isinstance(error, SequenceParallelConfigError)
        assert "of 9 tokens" in str(error)


def test_default_cases_hold_what_they_promise() -> None:
    for size in SIZES:
        cases = default_cases("lasp", size)
        assert all(refusal(case) is None for case in cases)
        assert {(case.decay, case.exchange) for case in cases} >= set(product(DECAYS, EXCHANGES)) - {("delta", "auto")}
        assert {case.layout for case in cases} == {"contiguous", "zigzag"}
        assert all(case.length % 2 for case in cases if case.length != size - 1)
        for decay in DECAYS:
            own = [case for case in cases if case.decay == decay]
            assert {case.states for case in own} == {True, False}
            assert any(case.v_dim != case.head_dim for case in own)
            assert any(
                case.mask.cu_seqlens and _shares_and_crosses(case) for case in own if case.layout == "contiguous"
            )
            assert any(case.sizes for case in own)
            gated = decay not in ("none", "delta")
            assert {case.gates for case in own} == ({"moderate", "strong", "weak"} if gated else {"moderate"})
            if size > 1:
                assert any(0 in case.tokens().sizes for case in own)
        assert {case.mask.causal for case in cases if case.decay == "none"} == {True, False}


def _shares_and_crosses(case: Case) -> bool:
    """Whether a shard holds several documents, and a document reaches over several shards."""
    assert case.mask.cu_seqlens is not None
    ends = set(accumulate(shard_sizes(case.length, case.size)))
    borders = set(case.mask.cu_seqlens[1:-1])
    several = any(
        sum(1 for border in borders if end - size < border < end) >= 2
        for end, size in zip(sorted(ends), shard_sizes(case.length, case.size), strict=True)
    )
    return several and (case.size == 1 or bool(ends - borders - {case.length}))
