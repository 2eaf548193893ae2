"""Claims about every method: equal to one process in fp64, to its formula in bytes, whatever the sizes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dsp_plugin import Layout, MaskSpec, SequenceParallelConfig, SequenceParallelConfigError, SequenceParallelGroups
from dsp_plugin.comm import ledger
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import METHODS, WireBytes, Workload, dsp, ulysses
from dsp_plugin.methods.method import Where
from dsp_plugin.spawn import RankFailure, spawn
from dsp_plugin.verification import Case, CaseResult, default_cases, run_case, run_cases

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

SIZES = [1, 2, 3, 4, 8]
SUBJECTS = ["dsp", "ulysses"]


def build(method: str, size: int) -> SequenceParallelGroups:
    return SequenceParallelGroups.build(SequenceParallelConfig(method=method, size=size))


def verify(size: int, cases: list[Case]) -> list[CaseResult]:
    """Run the cases in one world and complain about all that fail at once."""
    results = spawn(run_cases, size, cases, timeout=200)[0]
    failures = [f"{r.case.describe()}: {'; '.join(r.failures())}" for r in results if r.refused is None and not r.ok]
    assert not failures, "\n".join(failures)
    return results


# dsp has no heads to share out, and at eight ranks takes as long as all its other sizes together.
DEAR = ("dsp", 8)


@pytest.mark.parametrize(
    ("method", "size"),
    [
        pytest.param(*pair, marks=pytest.mark.matrix if pair == DEAR else ())
        for pair in itertools.product(SUBJECTS, SIZES)
    ],
)
def test_output_every_gradient_and_every_byte_for_all_masks_heads_and_layouts(method: str, size: int) -> None:
    cases = [*default_cases(method, size), *default_cases(method, size, {"heads": 8, "kv_heads": 8, "seed": 1})]
    results = verify(size, cases)
    # Nothing is left out but what has fewer heads than ranks.
    for result in results:
        too_few = method == "ulysses" and result.case.heads < size
        assert (result.refused is not None) == too_few, (result.case.describe(), result.refused)
        sizes = result.case.grid or (result.case.length,)
        assert size == 1 or any(dim % size for dim in sizes), sizes
    ran = [result.case for result in results if result.refused is None]
    assert {case.layout for case in ran} == set(METHODS[method].layouts)
    assert len({case.mask for case in ran}) >= 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", SUBJECTS)
def test_other_dtypes(method: str, dtype: torch.dtype) -> None:
    """fp64 to 1e-12; 16 bits no further from the oracle than 1.5 times the unsharded run."""
    fixed = {"dtype": dtype, "mask": "causal+packed+window", "seed": 2}
    layouts = METHODS[method].layouts
    verify(3, [case for layout in layouts for case in default_cases(method, 3, {**fixed, "layout": layout})])


UNUSUAL = {
    "fewer tokens than ranks": {"length": 3},
    "one token": {"length": 1},
    "values of another width": {"value_dim": 24},
    "one row": {"batch": 1, "length": 41},
    "a document for every token": {"length": 5, "mask": "packed:1,1,1,1,1"},
    "queries that see nothing but themselves": {"length": 11, "mask": "window:0,0"},
    "empty documents": {"length": 9, "mask": MaskSpec(cu_seqlens=(0, 0, 4, 4, 9))},
    "dropout": {"dropout": 0.3, "heads": 6, "kv_heads": 2, "mask": "causal"},
    "the math kernel": {"kernel": "math", "heads": 7, "mask": "causal+window"},
    "the reference kernel": {"kernel": "reference", "heads": 7, "mask": "packed"},
    "groups cut between ranks": {"heads": 10, "kv_heads": 5},
    "many more heads than ranks": {"heads": 21, "kv_heads": 7},
}


def test_unusual_attention() -> None:
    verify(4, [case for fixed in UNUSUAL.values() for case in default_cases("ulysses", 4, fixed)])


def test_unusual_grids() -> None:
    grids = [(1, 7), (7, 1), (2, 3), (2, 2, 2), (5, 1, 3), (3, 2, 3, 2)]
    verify(
        4, [case for grid in grids for case in default_cases("dsp", 4, {"grid": grid, "heads": 2, "mask": "causal"})]
    )


def _broken(subject: str, flaw: str) -> list[CaseResult]:
    """Results of a method that was broken on purpose."""
    groups = build(subject, 2)
    FLAWS[flaw](groups.sp.rank)
    return [run_case(case, groups) for case in default_cases(subject, 2, {"heads": 4, "mask": "causal"})]


def _attention_with(change: Callable[..., Tensor]) -> None:
    true = ulysses.METHOD.attention
    assert true is not None

    def attention(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        return change(true, q, k, v, **settings)

    METHODS["ulysses"] = replace(ulysses.METHOD, attention=attention)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _output_off(rank: int) -> None:
    _attention_with(lambda true, q, k, v, **settings: true(q, k, v, **settings) * (1 + 1e-4 * rank))


def _output_nan(rank: int) -> None:
    _attention_with(lambda true, q, k, v, **settings: true(q, k, v, **settings) * (torch.nan if rank else 1.0))


def _dk_off(rank: int) -> None:
    factor = 1 + 1e-4 * rank
    _attention_with(lambda true, q, k, v, **settings: true(q, _ScaledGradient.apply(k, factor), v, **settings))


def _formula_off(rank: int) -> None:
    true = ulysses.wire_bytes

    def wire_bytes(workload: Workload, of_rank: int) -> WireBytes:
        forward, backward = true(workload, of_rank)
        return WireBytes(forward, backward + 4 * of_rank)

    METHODS["ulysses"] = replace(ulysses.METHOD, wire_bytes=wire_bytes)


def _gather_without_factor(rank: int) -> None:
    true = dsp.gather

    def gather(x: Tensor, dim: int, *, length: int, groups: SequenceParallelGroups) -> Tensor:
        return true(_ScaledGradient.apply(x, 1 / groups.dsp.size), dim, length=length, groups=groups)

    dsp.gather = gather


def _split_as_sum(rank: int) -> None:
    true = dsp.split

    def split(x: Tensor, dim: int, *, groups: SequenceParallelGroups) -> Tensor:
        return true(_ScaledGradient.apply(x, groups.dsp.size), dim, groups=groups)

    dsp.split = split


def _switch_gradient_off(rank: int) -> None:
    true = dsp.switch

    def switch(x: Tensor, *args: int, **settings: Any) -> Tensor:
        return true(_ScaledGradient.apply(x, 1 + 1e-4 * rank), *args, **settings)

    dsp.switch = switch


FLAWS = {
    flaw.__name__: flaw
    for flaw in (
        _output_off,
        _output_nan,
        _dk_off,
        _formula_off,
        _gather_without_factor,
        _split_as_sum,
        _switch_gradient_off,
    )
}


@pytest.mark.parametrize(
    ("subject", "flaw", "complaint"),
    [
        ("ulysses", "_output_off", "out is off"),
        ("ulysses", "_output_nan", "out is off by nan"),
        ("ulysses", "_dk_off", "dk is off"),
        ("ulysses", "_formula_off", "rank 1 sent"),
        ("dsp", "_gather_without_factor", "d enter is off"),
        ("dsp", "_split_as_sum", "d x is off"),
        ("dsp", "_switch_gradient_off", "gradient of switch t ->"),
    ],
)
def test_verification_sees_a_flaw_on_one_rank(subject: str, flaw: str, complaint: str) -> None:
    for results in spawn(_broken, 2, subject, flaw, timeout=60):
        for result in results:
            assert not result.ok
            assert any(line.startswith(complaint) for line in result.failures()), result.failures()
            if flaw not in ("_output_off", "_output_nan"):
                assert result.output.ok


def _dropped(size: int, kind: str) -> tuple[bool, float, bool]:
    """Attention weights, read off by one-hot values, sharded and not."""
    groups, single = build("ulysses", size), SequenceParallelGroups.single()
    length, heads, kv_heads = 13, 4, 2
    generator = torch.Generator().manual_seed(5)
    q, k = (torch.randn(2, length, count, 8, generator=generator).double() for count in (heads, kv_heads))
    v = torch.eye(length).double().view(1, length, 1, length).expand(2, length, kv_heads, length)
    layout = Layout(kind, length, size)

    def weights(groups: SequenceParallelGroups, layout: Layout, seed: int) -> Tensor:
        q_n, k_n, v_n = (layout.shard(x, 1, groups.ulysses.rank) for x in (q, k, v))
        what = AttentionSpec(dropout_p=0.3, dropout_seed=seed)
        return ulysses.attention(q_n, k_n, v_n, what=what, where=Where(groups, layout))

    whole = weights(single, Layout("contiguous", length, 1), seed=11)
    mine = weights(groups, layout, seed=11)
    other = weights(groups, layout, seed=12)
    expected = layout.shard(whole, 1, groups.ulysses.rank)
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    dropped = (whole == 0).double().mean().item()
    return torch.equal(mine == 0, expected == 0), dropped, torch.equal(mine == 0, other == 0)


@pytest.mark.parametrize("kind", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [2, 3])
def test_dropout_drops_the_same_weights_at_every_size(size: int, kind: str) -> None:
    for same, dropped, same_with_another_seed in spawn(_dropped, size, size, kind, timeout=60):
        assert same
        assert 0.25 < dropped < 0.35
        assert not same_with_another_seed


def _calls(size: int) -> list[int]:
    groups, layout = build("ulysses", size), Layout("zigzag", 11, size)
    q, k, v = (torch.randn(1, layout.sizes[groups.sp.rank], heads, 8, requires_grad=True) for heads in (6, 2, 2))
    with ledger() as log:
        what = AttentionSpec(MaskSpec(causal=True))
        ulysses.attention(q, k, v, what=what, where=Where(groups, layout)).sum().backward()
    return [log.calls(phase="forward"), log.calls(phase="backward")]


def test_ulysses_takes_two_collectives_each_way() -> None:
    assert spawn(_calls, 3, 3, timeout=60) == [[2, 2]] * 3


@pytest.mark.parametrize("size", [2, 4])
def test_ulysses_bytes_are_the_papers_where_everything_divides(size: int) -> None:
    """2(1+g)(U-1)/U X each way, and with K < U a kv part of 2(U-1) B n D e, g = K/H, X one query shard."""
    batch, length, heads, dim, width = 2, 8 * size, 8, 16, 4
    shard = batch * length // size
    x = shard * heads * dim * width
    expected = {8: 2 * 2 * (size - 1) * x // size, 4: 3 * (size - 1) * x // size}
    assert expected[4] * size == 2 * (1 + 4 / 8) * (size - 1) * x
    if size > 2:
        q_and_out, kv = 2 * (size - 1) * x // size, 2 * (size - 1) * shard * dim * width
        expected |= {2: q_and_out + kv, 1: q_and_out + kv}
    cases = [
        Case("ulysses", size, batch, heads, kv, length, dim, layout=layout)
        for kv in expected
        for layout in METHODS["ulysses"].layouts
    ]
    for result in verify(size, cases):
        for check in result.wire:
            assert (check.forward, check.backward) == (expected[result.case.kv_heads],) * 2, result.case.describe()


VIDEO = {"batch": 2, "heads": 8, "dim": 4, "width": 4}


def _layer_bytes(size: int, frames: int, patches: int) -> dict[str, int]:
    """What leaves this rank, forward and backward, in a layer of one space block and one time block, by the ledger.

    Both baselines are Ulysses with q, k, v and out each exchanged once per attention that runs along a sharded dim.
    """
    groups = build("dsp", size)
    batch, heads, dim = VIDEO["batch"], VIDEO["heads"], VIDEO["dim"]
    sent = {}

    x = torch.randn(batch, frames, patches, heads * dim)
    local = Layout("contiguous", frames, size).shard(x, 1, groups.dsp.rank).clone().requires_grad_()
    with ledger() as log:
        in_time = dsp.switch(local, 1, 2, length=frames, groups=groups)
        dsp.switch(in_time, 2, 1, length=patches, groups=groups).sum().backward()
    sent["dsp"] = log.bytes()

    def attend(rows: int, length: int) -> None:
        layout = Layout("contiguous", length, size)
        shape = (rows, layout.sizes[groups.ulysses.rank], heads, dim)
        q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
        ulysses.attention(q, k, v, what=AttentionSpec(), where=Where(groups, layout)).sum().backward()

    with ledger() as log:  # Patches are sharded throughout: space attention pays, time attention is local.
        attend(batch * frames, patches)
    sent["ulysses on one sharded dim"] = log.bytes()
    with ledger() as log:  # The flat sequence of all tokens is sharded: both blocks pay.
        attend(batch, frames * patches)
        attend(batch, frames * patches)
    sent["ulysses in both blocks"] = log.bytes()
    return sent


def _layer_formulas(size: int, frames: int, patches: int, rank: int) -> dict[str, int]:
    def of(method: str, batch: int, length: int, grid: tuple[int, int] | None = None) -> int:
        heads, dim = VIDEO["heads"], VIDEO["dim"]
        shape = Workload(size, heads, heads, length, batch, dim, element_size=VIDEO["width"], grid=grid)
        return sum(METHODS[method].wire_bytes(shape, rank))

    batch = VIDEO["batch"]
    return {
        "dsp": of("dsp", batch, frames * patches, (frames, patches)),
        "ulysses on one sharded dim": of("ulysses", batch * frames, patches),
        "ulysses in both blocks": 2 * of("ulysses", batch, frames * patches),
    }


@pytest.mark.parametrize(("frames", "patches"), [(8, 12), (7, 10), (5, 9)])
@pytest.mark.parametrize("size", [2, 4])
def test_a_dsp_layer_moves_half_and_a_quarter_of_what_ulysses_moves(size: int, frames: int, patches: int) -> None:
    """A space+time layer, forward and backward: at most half of Ulysses on one sharded dim (the space block pays), at
    most a quarter of Ulysses in both blocks. Multi-head attention; with shared kv heads Ulysses sends less.
    """
    measured = spawn(_layer_bytes, size, size, frames, patches, timeout=60)
    assert measured == [_layer_formulas(size, frames, patches, rank) for rank in range(size)]
    total = {name: sum(of_rank[name] for of_rank in measured) for name in measured[0]}
    assert 0 < 2 * total["dsp"] <= total["ulysses on one sharded dim"]
    assert 4 * total["dsp"] <= total["ulysses in both blocks"]
    if frames % size == patches % size == 0:
        assert 2 * total["dsp"] == total["ulysses on one sharded dim"]
        assert 4 * total["dsp"] == total["ulysses in both blocks"]


def _refused(method: str, size: int, fixed: dict[str, Any]) -> tuple[list[str | None], int]:
    groups = build(method, size)
    with ledger() as log:
        results = [run_case(case, groups) for case in default_cases(method, size, fixed)]
    return [result.refused for result in results], log.calls()


@pytest.mark.parametrize(
    ("method", "fixed", "words"),
    [
        ("ulysses", {"heads": 2}, "heads=2 < ulysses_size=3"),
        ("ulysses", {"heads": 6, "kv_heads": 4}, "heads=6 is not a multiple of kv_heads=4"),
        ("ulysses", {"mask": MaskSpec(cu_seqlens=(0, 5)), "length": 7, "heads": 4}, "last border is 5"),
        ("ulysses", {"kernel": "fa3", "heads": 4}, "kernel='fa3'"),
        ("dsp", {"layout": "zigzag"}, "method dsp takes contiguous"),
        ("dsp", {"dropout": 0.5}, "never looks inside attention"),
    ],
)
def test_illegal_cases_are_refused_on_every_rank_before_anything_is_sent(
    method: str, fixed: dict[str, Any], words: str
) -> None:
    answers = spawn(_refused, 3, method, 3, fixed, timeout=60)
    assert len({tuple(reasons) for reasons, _ in answers}) == 1
    for reasons, calls in answers:
        assert calls == 0
        assert reasons
        assert all(reason is not None and words in reason for reason in reasons), reasons


def _too_few_heads(size: int) -> None:
    groups, layout = build("ulysses", size), Layout("contiguous", 6, size)
    q, k, v = (torch.randn(1, layout.sizes[groups.sp.rank], 2, 4) for _ in range(3))
    ulysses.attention(q, k, v, what=AttentionSpec(), where=Where(groups, layout))


def test_the_method_itself_refuses_on_every_rank() -> None:
    with pytest.raises(RankFailure) as failure:
        spawn(_too_few_heads, 3, 3, timeout=60)
    assert set(failure.value.errors) == {0, 1, 2}
    for error in failure.value.errors.values():
        assert isinstance(error, SequenceParallelConfigError)
        assert "heads=2 < ulysses_size=3" in str(error)
