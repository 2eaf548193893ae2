"""Softmax methods on drawn workloads, judged by the fp64 oracle and the byte formulas."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from drawn_worlds import examples, run_world, shown, worlds
from hypothesis import given
from hypothesis import strategies as st

from dsp_plugin import MaskSpec
from dsp_plugin.methods import METHODS
from dsp_plugin.verification import Case, refusal

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
        whole_below=draw(st.sampled_from([0, 20])),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.4])),
        seed=draw(st.integers(0, 3)),
        ulysses_size=draw(st.sampled_from(factors)),
    )
    # In 16 bits two roundings are compared by their root mean squares, which takes some of them.
    smallest = case.batch * length * kv_heads * min(case.head_dim, case.v_dim)
    if smallest >= ENOUGH and draw(st.booleans()):
        return replace(case, dtype=torch.bfloat16)
    return case


@examples(12)
@given(world=worlds(cases))
def test_any_workload_is_exact_or_refused_with_a_reason(world: list[Case]) -> None:
    for case, result in run_world(world):
        assert result.refused == refusal(case), shown(case)
        too_few_heads = case.heads < (case.ulysses_size or (case.size if case.method == "ulysses" else 1))
        assert (result.refused is not None) == too_few_heads, f"{result.refused}: {shown(case)}"
        assert result.refused or result.ok, f"{result.failures()}: {shown(case)}"
