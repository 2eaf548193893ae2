"""LASP on drawn workloads, judged by the token recurrence in fp64 and the byte formulas.

One example is several cases that run in one world of spawned processes, because a world costs more than a case. Draws
are the same in every run; a failure shrinks to one case in most runs, and its message has the case.
"""

from __future__ import annotations

from dataclasses import fields
from itertools import accumulate

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dsp_plugin import MaskSpec
from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.methods.state_exchange import EXCHANGES
from dsp_plugin.spawn import spawn
from dsp_plugin.verification import Case, refusal, run_cases

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


@st.composite
def drawn_cases(draw: st.DrawFn, size: int) -> Case:
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


@st.composite
def worlds(draw: st.DrawFn) -> list[Case]:
    size = draw(st.sampled_from([2, 3, 4]))
    return draw(st.lists(drawn_cases(size), min_size=1, max_size=16))


def shown(case: Case) -> str:
    """Python that makes the case again."""
    values = (f"{field.name}={getattr(case, field.name)!r}" for field in fields(case))
    return f"Case({', '.join(values)})"


@settings(
    max_examples=8,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(world=worlds())
def test_any_workload_is_exact(world: list[Case]) -> None:
    results = spawn(run_cases, world[0].size, world, timeout=100)[0]
    for case, result in zip(world, results, strict=True):
        assert refusal(case) is None, shown(case)
        assert result.ok, f"{result.failures()}: {shown(case)}"
