"""Claims about ring, USP and LightSeq: method x size x layout x mask x heads x dtype, all against the fp64 oracle.

Every case compares the output and all gradients, and the bytes that left each rank with the formula, see
`dsp_plugin.verification`. By default a covering subset runs, with ``--matrix`` the whole product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from dsp_plugin import Layout, MaskSpec, SequenceParallelConfig, SequenceParallelConfigError, SequenceParallelGroups
from dsp_plugin.config.attention import attention_of
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import METHODS, lightseq, ring, ring_calls
from dsp_plugin.methods.method import Where
from dsp_plugin.spawn import RankFailure, spawn
from dsp_plugin.verification import Case, CaseResult, default_cases, refusal, run_cases

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

METHODS_HERE = ["ring", "usp", "lightseq"]
SIZES = [1, 2, 3, 4, 8]
HEADS = [(6, 2), (8, 1), (7, 7), (4, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# Of queries and keys, and of values.
DIMS = [(16, None), (24, 8)]


def verify(size: int, cases: list[Case], timeout: float = 180) -> list[CaseResult]:
    """Run the cases in one world and complain about all that fail at once."""
    results = spawn(run_cases, size, cases, timeout=timeout)[0]
    failures = [f"{r.case.describe()}: {'; '.join(r.failures())}" for r in results if r.refused is None and not r.ok]
    assert not failures, "\n".join(failures)
    return results


def placements(method: str, size: int) -> list[Case]:
    """Every legal layout, document handling, factorization and mask of a method at a size, in one dtype."""
    return default_cases(method, size, {"heads": 8, "kv_heads": 8})


def legal_heads(case: Case) -> list[tuple[int, int]]:
    return [heads for heads in HEADS if refusal(replace(case, heads=heads[0], kv_heads=heads[1])) is None]


def covering(method: str, size: int) -> list[Case]:
    """Every placement once, head counts, dtypes and head dims taking turns."""
    cases = []
    for turn, case in enumerate(placements(method, size)):
        possible = legal_heads(case)
        heads, kv_heads = possible[turn % len(possible)]
        head_dim, value_dim = DIMS[turn // 2 % 2]
        dtype = DTYPES[(turn + turn // 3) % 3]
        cases.append(
            replace(
                case, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype, seed=turn
            )
        )
    return cases


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS_HERE)
def test_every_placement_is_exact_in_output_gradients_and_bytes(method: str, size: int) -> None:
    results = verify(size, covering(method, size))
    assert all(result.refused is None for result in results)
    ran = [result.case for result in results]
    assert all(case.length % 2 and case.batch == 2 for case in ran)
    assert {case.layout for case in ran} == set(METHODS[method].layouts)
    assert {case.mask.describe().split("(")[0] for case in ran} >= {"causal", "full", "full+window", "full+packed"}
    for layout in METHODS[method].layouts:
        assert len({case.mask for case in ran if case.layout == layout}) == 5
    if "zigzag" in METHODS[method].layouts:
        assert any(case.by_document for case in ran)
    if method == "usp":
        assert {case.ulysses_size for case in ran} == {u for u in range(1, size + 1) if size % u == 0}


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", METHODS_HERE)
def test_the_whole_matrix(method: str, size: int, dtype: torch.dtype) -> None:
    cases = [
        replace(case, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype, seed=seed)
        for seed, case in enumerate(placements(method, size))
        for heads, kv_heads in legal_heads(case)
        for head_dim, value_dim in DIMS
    ]
    verify(size, cases, timeout=390)


UNUSUAL: dict[str, dict[str, Any]] = {
    "fewer tokens than ranks": {"length": 3},
    "one token": {"length": 1},
    "one row": {"batch": 1, "length": 41},
    "a document for every token": {"length": 5, "mask": "packed:1,1,1,1,1"},
    "queries that see nothing but themselves": {"length": 11, "mask": "window:0,0"},
    "queries that see only what comes after them": {"length": 23, "mask": "window:0,5"},
    "empty and tiny documents": {"length": 25, "mask": MaskSpec(causal=True, cu_seqlens=(0, 0, 4, 4, 5, 7, 25, 25))},
    "dropout": {"dropout": 0.3},
    "dropout on documents": {"dropout": 0.3, "mask": "causal+packed+window", "dtype": torch.float64},
    "the math kernel": {"kernel": "math", "mask": "causal+window"},
    "the reference kernel": {"kernel": "reference", "mask": "packed"},
    "heads cut unevenly": {"heads": 10, "kv_heads": 5, "mask": "causal"},
    "heads cut unevenly in bf16": {"heads": 9, "kv_heads": 3, "dropout": 0.4, "dtype": torch.bfloat16, "length": 73},
    "fewer key heads than ranks": {"heads": 8, "kv_heads": 2, "mask": "causal+packed+window"},
    "gradients in bf16": {"ring_gradient_dtype": "input", "dtype": torch.bfloat16, "mask": "causal"},
    "gradients in bf16, documents": {"ring_gradient_dtype": "input", "dtype": torch.float16, "mask": "causal+packed"},
}


@pytest.mark.parametrize("method", METHODS_HERE)
def test_unusual_attention(method: str) -> None:
    cases = []
    for fixed in UNUSUAL.values():
        heads = {"heads": 6, "kv_heads": 2} | {key: fixed[key] for key in ("heads", "kv_heads") if key in fixed}
        found = default_cases(method, 4, {**fixed, **heads})
        # Without a mask of its own an unusual case goes with every mask; two are enough.
        cases += [case for case in found if case.mask in (found[0].mask, found[-1].mask)]
    assert all(result.refused is None for result in verify(4, cases))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("method", [name for name in METHODS_HERE if "zigzag" in METHODS[name].layouts])
def test_short_documents_that_lie_whole_on_a_rank(method: str, size: int) -> None:
    cases = [
        case
        for causal, window in ((True, None), (False, None), (True, (5, 0)))
        for case in default_cases(
            method,
            size,
            {
                "mask": MaskSpec(
                    causal, window, (0, *accumulate([7, 41, 5, 6, 0, 7, 6, 8, 7, 5, 1, 6, 7, 8, 7, 1, 5]))
                ),
                **{"length": 127, "layout": "zigzag", "by_document": True, "dtype": torch.float64},
                **{"heads": 6, "kv_heads": 2},
            },
        )
    ]
    cases = [replace(case, whole_below=9) for case in cases]
    held = [cases[0].tokens().spans(rank) for rank in range(size)]
    # Of a document of 7 tokens that were cut in 2P runs no two neighbours would lie on one rank at P = 4.
    assert max(len(run) for runs in held for run in runs if run.start >= 48) >= 5
    assert sum(map(len, held)) < 18 + 4 * size
    assert all(result.refused is None for result in verify(size, cases))


@pytest.mark.parametrize("method", METHODS_HERE)
def test_more_ranks_than_tokens_at_eight(method: str) -> None:
    verify(8, [replace(case, length=5, heads=8, kv_heads=4) for case in default_cases(method, 8, {"mask": "causal"})])


# Of unlike lengths, some shorter than ranks are many, and a window that some of them fit into.
DOCUMENTS = (0, 1, 22, 22, 25, 60, 71, 104, 107)
JOINED: dict[str, dict[str, Any]] = {
    "documents": {"mask": MaskSpec(causal=True, cu_seqlens=DOCUMENTS)},
    "documents both ways": {"mask": MaskSpec(cu_seqlens=DOCUMENTS), "batch": 3},
    "documents under a window": {"mask": MaskSpec(causal=True, window=(12, 0), cu_seqlens=DOCUMENTS)},
    "documents under a window both ways": {"mask": MaskSpec(window=(9, 4), cu_seqlens=DOCUMENTS)},
    "dropout on documents": {"mask": MaskSpec(causal=True, cu_seqlens=DOCUMENTS), "dropout": 0.3},
    "other values": {"mask": MaskSpec(causal=True, cu_seqlens=DOCUMENTS), "head_dim": 8, "value_dim": 24},
    "one sequence": {"mask": MaskSpec(causal=True), "batch": 2},
    "a window over runs": {"mask": MaskSpec(causal=True, window=(41, 0))},
}


@pytest.mark.parametrize("size", [2, 3, 4, pytest.param(8, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("method", METHODS_HERE)
def test_joined_runs_and_documents_are_exact_in_fp64(method: str, size: int) -> None:
    fixed = {"heads": 8, "kv_heads": 4 if size == 8 else 2, "length": DOCUMENTS[-1], "dtype": torch.float64}
    cases = [case for given in JOINED.values() for case in default_cases(method, size, {**fixed, **given})]
    results = verify(size, [case for case in cases if refusal(case) is None])
    assert {result.case.mask for result in results} == {given["mask"] for given in JOINED.values()}


BOX = {"length": 13, "heads": 4, "kv_heads": 2}


def _weights(method: str, size: int, kind: str, ulysses_size: int | None) -> tuple[bool, bool, float]:
    """Attention weights, read off by one-hot values, sharded and not: same dropped, same with another seed, share."""
    sizes = {} if ulysses_size is None else {"ulysses_size": ulysses_size}
    config = SequenceParallelConfig(method=method, size=size, **sizes)
    groups, single = SequenceParallelGroups.build(config), SequenceParallelGroups.single()
    length, heads, kv_heads = BOX["length"], BOX["heads"], BOX["kv_heads"]
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, length, count, 8, generator=generator).double() for count in (heads, kv_heads))
    v = torch.eye(length).double().view(1, length, 1, length).expand(2, length, kv_heads, length)
    layout, rank = Layout(kind, length, size), groups.sp.rank

    def weights(groups: SequenceParallelGroups, layout: Layout, seed: int) -> Tensor:
        shards = (layout.shard(x, 1, groups.sp.rank).clone() for x in (q, k, v))
        what = AttentionSpec(MaskSpec(causal=True), dropout_p=0.3, dropout_seed=seed)
        return attention_of(config)(*shards, what=what, where=Where(groups, layout))

    whole = weights(single, Layout("contiguous", length, 1), seed=11)
    expected = layout.shard(whole, 1, rank)
    mine, other = weights(groups, layout, seed=11), weights(groups, layout, seed=12)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    seen = length * (length + 1) / 2
    dropped = 1 - (whole != 0).sum().item() / (2 * heads * seen)
    return torch.equal(mine == 0, expected == 0), torch.equal(mine == 0, other == 0), dropped


Variant = tuple[str, str, int | None]


def _all_weights(size: int, variants: list[Variant]) -> list[tuple[bool, bool, float]]:
    return [_weights(method, size, layout, ulysses_size) for method, layout, ulysses_size in variants]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_same_weights_are_dropped_at_every_size(size: int) -> None:
    inner = {2: [1, 2], 3: [1, 3], 4: [1, 2, 4]}[size]
    variants: list[Variant] = [
        (method, layout, ulysses_size)
        for method in [*METHODS_HERE, "ulysses"]
        for layout in METHODS[method].layouts
        for ulysses_size in (inner if method == "usp" else [None])
    ]
    for found in spawn(_all_weights, size, size, variants, timeout=120):
        for variant, (same, same_with_another_seed, dropped) in zip(variants, found, strict=True):
            assert same, variant
            assert not same_with_another_seed, variant
            assert 0.25 < dropped < 0.35, variant


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gradients_through_dropout_are_those_of_one_process(size: int) -> None:
    fixed = {"heads": 4, "kv_heads": 2, "dropout": 0.3, "dtype": torch.float64, "mask": "causal"}
    verify(size, [case for method in [*METHODS_HERE, "ulysses"] for case in default_cases(method, size, fixed)])


def _events(method: str, layout: str) -> list[str]:
    """What happens on this rank, forward then backward: ``post``, ``compute`` and ``wait`` of keys and of gradients."""
    module = {"ring": ring, "lightseq": lightseq}[method]
    log: list[str] = []

    class Logged(module.Transfers):
        def __init__(self, sends: Any, receives: Any, like: Tensor, collective: str, sender: Any) -> None:
            self.name = collective
            log.append(f"post {collective}")
            super().__init__(sends, receives, like, collective, sender)

        def wait(self) -> dict[int, Tensor]:
            log.append(f"wait {self.name}")
            return super().wait()

    def logged(compute: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            if log[-1] != "compute":
                log.append("compute")
            return compute(*args)

        return run

    module.Transfers = Logged
    computing, kind = {"ring": (ring_calls, "segments"), "lightseq": (lightseq, "block")}[method]
    for name in (f"{kind}_forward", f"{kind}_backward"):
        setattr(computing, name, logged(getattr(computing, name)))
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method=method, size=4))
    tokens = Layout(layout, 32, 4)
    q, k, v = (torch.randn(1, 8, 2, 4, requires_grad=True) for _ in range(3))
    what = AttentionSpec(MaskSpec(causal=True))
    out = METHODS[method].attention(q, k, v, what=what, where=Where(groups, tokens))
    log.append("backward")
    out.sum().backward()
    return log


def test_the_ring_computes_while_the_next_keys_and_the_last_gradients_are_on_their_way() -> None:
    hop = ["post ring_hop", "compute", "wait ring_hop"]
    for log in spawn(_events, 4, "ring", "zigzag", timeout=60):
        middle = log.index("backward")
        assert log[:middle] == [*hop, *hop, *hop, "compute"], "R-1 hops, each posted before the block computes"
        assert log[middle + 1 :] == [
            *hop,
            "post ring_hop",
            "compute",
            "post ring_gradient",
            "wait ring_hop",
            "post ring_hop",
            "compute",
            "wait ring_gradient",
            "post ring_gradient",
            "wait ring_hop",
            "compute",
            "wait ring_gradient",
            "post ring_gradient",
            "wait ring_gradient",
        ]


def test_lightseq_computes_while_the_next_fetch_and_the_last_results_are_on_their_way() -> None:
    for rank, log in enumerate(spawn(_events, 4, "lightseq", "contiguous", timeout=60)):
        middle = log.index("backward")
        # In the last step of four ranks, 0 and 1 idle.
        last = ["compute"] if rank >= 2 else []
        each_way = [
            "post fetch",
            "compute",
            "wait fetch",
            "post fetch",
            "compute",
            "post return",
            "wait fetch",
            *last,
            "wait return",
            "post return",
            "wait return",
        ]
        assert log[:middle] == each_way
        assert log[middle + 1 :] == each_way


def _mismatched(method: str) -> None:
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method=method, size=2))
    q, k, v = (torch.randn(1, 5, 2, 4) for _ in range(3))
    layout = Layout("contiguous", 8, 2)
    what = AttentionSpec(MaskSpec(cu_seqlens=(0, 3, 8)))
    METHODS[method].attention(q, k, v, what=what, where=Where(groups, layout))


@pytest.mark.parametrize("method", METHODS_HERE)
def test_shards_of_another_length_are_refused_on_every_rank(method: str) -> None:
    with pytest.raises(RankFailure) as failure:
        spawn(_mismatched, 2, method, timeout=60)
    assert set(failure.value.errors) == {0, 1}
    for error in failure.value.errors.values():
        assert isinstance(error, SequenceParallelConfigError)
        assert "5" in str(error)


def test_gradients_in_the_input_dtype_halve_their_bytes() -> None:
    """Causal zigzag in bf16: forward 0.75 of the ring, backward that and as much again instead of twice as much."""
    case = Case("ring", 4, length=48, dtype=torch.bfloat16, mask=MaskSpec(causal=True), layout="zigzag")
    wide, narrow = verify(4, [case, replace(case, ring_gradient_dtype="input")])
    forward = 0.75 * 2 * 3 * 2 * 12 * 2 * 16 * 2
    for result, times in ((wide, 3), (narrow, 2)):
        assert sum(check.forward for check in result.wire) == 4 * forward
        assert sum(check.backward for check in result.wire) == 4 * forward * times


def test_the_settings_reach_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SequenceParallelConfig(method="ring", size=1, ring_gradient_dtype="input", kernel="math")
    given: list[tuple[str, str]] = []

    def attention(
        q: Tensor, k: Tensor, v: Tensor, *, what: AttentionSpec, where: Where, ring_gradient_dtype: str
    ) -> Tensor:
        given.append((what.kernel, ring_gradient_dtype))
        return q

    monkeypatch.setitem(METHODS, "ring", replace(METHODS["ring"], attention=attention))
    x = torch.zeros(1, 3, 2, 4)
    attention_of(config)(
        x, x, x, what=AttentionSpec(), where=Where(SequenceParallelGroups.single(), Layout("contiguous", 3, 1))
    )
    assert given == [("math", "input")]
