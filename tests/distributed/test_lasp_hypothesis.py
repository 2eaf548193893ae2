"""LASP on drawn workloads, judged by the token recurrence in fp64 and the byte formulas."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from drawn_worlds import examples, run_world, shown, worlds
from hypothesis import given
from hypothesis import strategies as st

from dsp_plugin import MaskSpec
from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.methods.state_exchange import EXCHANGES
from dsp_plugin.verification import Case, refusal

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@st.composite
def cases(draw: st.DrawFn, size: int) -> Case:
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(sum))
    length = sum(lengths)
    decay = draw(st.sampled_from(DECAYS))
    causal = decay != "none" or draw(st.booleans())
    mask = MaskSpec(causal=causal, cu_seqlens=draw(st.sampled_from([None, (0, *accumulate(lengths))])))
    layout = draw(st.sampled_from(["contiguous", "contiguous", "zigzag"]))
    cuts = sorted(draw(st.lists(st.integers(0, length), min_size=size - 1, max_size=size - 1)))
    uneven = tuple(b - a for a, b in zip((0, *cuts), (*cuts, length), strict=True))
    kv_heads = draw(st.integers(1, 3))
    return Case(
        "lasp",
        size,
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        length=length,
        head_dim=draw(st.sampled_from([1, 5, 16, 32])),
        value_dim=draw(st.sampled_from([None, 1, 7, 24])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        mask=mask,
        layout=layout,
        # Which documents cross ranks, and are sent where attention is bidirectional, depends on sizes that workloads do
        # not have.
        sizes=draw(st.sampled_from([None, uneven])) if layout == "contiguous" and causal else None,
        by_document=layout == "zigzag" and mask.cu_seqlens is not None and draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
        decay=decay,
        exchange=draw(st.sampled_from(["auto", *EXCHANGES])),
        gates=draw(st.sampled_from(["moderate", "strong", "weak"])),
        states=causal and draw(st.booleans()),
    )


@examples(8)
@given(world=worlds(cases))
def test_any_workload_is_exact(world: list[Case]) -> None:
    for case, result in run_world(world):
        assert refusal(case) is None, shown(case)
        assert result.ok, f"{result.failures()}: {shown(case)}"
