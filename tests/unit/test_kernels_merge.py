"""Attention computed block by block, merged by lse and differentiated with the merged result, is the whole's."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from test_kernels_parity import KERNELS_ON_CPU, MASKS, Shape, assert_close, fast, make, oracle, run
from torch import Tensor

from dsp_plugin.kernels import (
    AttentionSpec,
    attention,
    block_backward,
    block_forward,
    calls,
    empty_state,
    merge_,
    prepare,
)
from dsp_plugin.layout import LAYOUTS, Layout
from dsp_plugin.mask import MaskSpec

pytestmark = pytest.mark.timeout(60)


def in_blocks(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, layout: Layout, kernel: str, **arguments
) -> dict[str, Tensor]:
    """What a ring does, in one process: every run of queries against every run of keys, then all blocks backward."""
    q, k, v = (x.detach() for x in (q, k, v))
    call = prepare(q, k, v, AttentionSpec(kernel=kernel, **arguments))
    runs = [run for rank in range(layout.size) for run in layout.spans(rank)]

    def at(x: Tensor, run: range) -> Tensor:
        return x[:, run.start : run.stop : run.step]

    result = dict(zip(("out", "lse"), empty_state(q, v), strict=True))
    result |= {name: torch.zeros_like(x) for name, x in (("dq", q), ("dk", k), ("dv", v))}
    for rows in runs:
        out, lse = empty_state(at(q, rows), v)
        for cols in runs:
            merge_(out, lse, *block_forward(call, at(q, rows), at(k, cols), at(v, cols), rows, cols))
        at(result["out"], rows).copy_(out)
        at(result["lse"].mT, rows).copy_(lse.mT)
        for cols in runs:
            tensors = at(dout, rows), at(q, rows), at(k, cols), at(v, cols), out, lse
            dq, dk, dv = block_backward(call, *tensors, rows, cols)
            at(result["dq"], rows).add_(dq)
            at(result["dk"], cols).add_(dk)
            at(result["dv"], cols).add_(dv)
    return result


@pytest.mark.parametrize("kernel", KERNELS_ON_CPU)
@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("mask_name", ["full", "causal", "causal-window", "packed-window", "window-left"])
def test_blocks_merge_to_the_whole(kernel: str, kind: str, mask_name: str) -> None:
    q, k, v, dout = make(Shape(v_dim=24))
    mask = MASKS[mask_name]
    got = in_blocks(q, k, v, dout, Layout(kind, 67, 3), kernel, mask=mask)
    assert_close(got, oracle(q, k, v, dout, mask=mask), 1e-5)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_blocks_with_uneven_heads_and_dropout_merge_to_the_whole(kind: str) -> None:
    q, k, v, dout = make(Shape())
    arguments = {"mask": MASKS["packed-causal"], "dropout_p": 0.3, "dropout_seed": 5, "q_per_kv": (1, 3)}
    got = in_blocks(q, k, v, dout, Layout(kind, 67, 3), "math", **arguments)
    assert_close(got, oracle(q, k, v, dout, **arguments), 1e-5)


def test_merging_nothing_into_nothing_stays_empty() -> None:
    out, lse = empty_state(torch.zeros(1, 3, 2, 4), torch.zeros(1, 5, 2, 6))
    merge_(out, lse, out.clone(), lse.clone())
    assert not out.any()
    assert torch.all(lse == -torch.inf)


def test_the_counter_sees_one_call_per_non_empty_block() -> None:
    q, k, v, dout = make(Shape())
    with calls() as outer:
        with calls() as log:
            out = attention(q, k, v, AttentionSpec(MASKS["packed-causal"], kernel="math"))
            assert (log.forward, log.backward) == (2, 0)
        with calls() as log:
            out.backward(dout)
            assert (log.forward, log.backward) == (0, 2)
            assert log.of(kernel="math") == 2
            assert log.of(kernel="cpu_flash") == 0
    assert (outer.forward, outer.backward) == (2, 2)
    attention(q, k, v, AttentionSpec(MaskSpec(), kernel="math"))
    assert outer.forward == 2


def test_documents_are_never_attended_across() -> None:
    q, k, v, dout = make(Shape())
    borders = (0, 20, 45, 67)
    whole = run(fast, q, k, v, dout, mask=MaskSpec(True, None, borders))
    for a, b in pairwise(borders):
        one = [x.detach()[:, a:b].requires_grad_() for x in (q, k, v)]
        alone = run(fast, *one, dout[:, a:b], mask=MaskSpec(True))
        for name in ("out", "dq", "dk", "dv"):
            torch.testing.assert_close(whole[name][:, a:b], alone[name])
