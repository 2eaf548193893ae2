"""Softmax methods on drawn workloads, judged by the fp64 oracle and the byte formulas.

One example is several cases that run in one world of spawned processes, because a world costs more than a case. Draws
are the same in every run; a failure shrinks to one case in most runs, and its message has the case.
"""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import accumulate

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dsp_plugin import MaskSpec
from dsp_plugin.methods import METHODS
from dsp_plugin.spawn import spawn
from dsp_plugin.verification import Case, refusal, run_cases

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

ENOUGH = 2000
SOFTMAX = [name for name, method in METHODS.items() if method.kind == "softmax"]


@st.composite
def masks(draw: st.DrawFn) -> tuple[int, MaskSpec]:
    """A length and a mask over it."""
    scale = draw(st.sampled_from([1, 1, 4]))
    lengths = [scale * length for length in draw(st.lists(st.integers(0, 24), min_size=1, max_size=4).filter(sum))]
    side = st.one_of(st.none(), st.integers(0, 40))
    window = draw(st.one_of(st.none(), st.tuples(side, side)))
    borders = (0, *accumulate(lengths)) if draw(st.booleans()) else None
    return sum(lengths), MaskSpec(draw(st.booleans()), window, borders)


@st.composite
def cases(draw: st.DrawFn, size: int) -> Case:
    method = draw(st.sampled_from(SOFTMAX))
    length, mask = draw(masks())
    kv_heads = draw(st.integers(1, 4))
    layout = draw(st.sampled_from(METHODS[method].layouts))
    factors = [u for u in range(1, size + 1) if size % u == 0] if method == "usp" else [None]
    case = Case(
        method,
        size,
        batch=draw(st.integers(1, 2)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        length=length,
        head_dim=draw(st.sampled_from([4, 16, 24])),
        value_dim=draw(st.sampled_from([None, 8, 20])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        mask=mask,
        layout=layout,
        by_document=layout == "zigzag" and mask.cu_seqlens is not None and draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.4])),
        seed=draw(st.integers(0, 3)),
        ulysses_size=draw(st.sampled_from(factors)),
    )
    # In 16 bits two roundings are compared by their root mean squares, which takes some of them.
    smallest = case.batch * length * kv_heads * min(case.head_dim, case.v_dim)
    if smallest >= ENOUGH and draw(st.booleans()):
        return replace(case, dtype=torch.bfloat16)
    return case


@st.composite
def worlds(draw: st.DrawFn) -> list[Case]:
    size = draw(st.sampled_from([2, 3, 4]))
    return draw(st.lists(cases(size), min_size=1, max_size=16))


def shown(case: Case) -> str:
    """Python that makes the case again."""
    given = (f"{field.name}={getattr(case, field.name)!r}" for field in fields(case))
    return f"Case({', '.join(given)})"


@settings(
    max_examples=12,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(world=worlds())
def test_any_workload_is_exact_or_refused_with_a_reason(world: list[Case]) -> None:
    results = spawn(run_cases, world[0].size, world, timeout=100)[0]
    for case, result in zip(world, results, strict=True):
        assert result.refused == refusal(case), shown(case)
        too_few_heads = case.heads < (case.ulysses_size or (case.size if case.method == "ulysses" else 1))
        assert (result.refused is not None) == too_few_heads, f"{result.refused}: {shown(case)}"
        assert result.refused or result.ok, f"{result.failures()}: {shown(case)}"
