"""Segments, in one call or one by one, equal the fp64 dense oracle, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from flash_stand_ins import STAND_INS, standing_in
from test_kernels_parity import NAMES, Shape, error, fast, make, run
from torch import Tensor

from dsp_plugin.kernels import AttentionSpec, calls, prepare, segments_backward, segments_forward
from dsp_plugin.kernels.segments import Segments
from dsp_plugin.mask import MaskSpec

pytestmark = pytest.mark.timeout(60)


def borders(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int32)


def visible(rows: int, cols: int, left: int | None, right: int | None) -> Tensor:
    """bool ``[rows, cols]``: the band at the last query and key, from its definition."""
    seen = torch.zeros(rows, cols, dtype=torch.bool)
    for i in range(rows):
        first = 0 if left is None else max(0, i + cols - rows - left)
        last = cols if right is None else min(cols, i + cols - rows + right + 1)
        seen[i, first:last] = True
    return seen


def oracle(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention where ``seen`` ``[n, m]``, in fp64."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.double().repeat_interleave(group, 2) for x in (k, v))
    scores = (torch.einsum("bihd,bjhd->bhij", q.double(), k) * scale).masked_fill(~seen, -torch.inf)
    probabilities = scores.softmax(-1)
    if keep is not None:
        probabilities = probabilities * keep
    return torch.einsum("bhij,bjhd->bihd", probabilities, v), scores.logsumexp(-1)


def all_seen(segments: Segments) -> Tensor:
    """bool ``[n, m]`` of all segments, each where it lies."""
    seen = torch.zeros(int(segments.q_borders[-1]), int(segments.k_borders[-1]), dtype=torch.bool)
    pairs = zip(pairwise(segments.q_borders.tolist()), pairwise(segments.k_borders.tolist()), strict=True)
    for (q0, q1), (k0, k1) in pairs:
        seen[q0:q1, k0:k1] = visible(q1 - q0, k1 - k0, segments.left, segments.right)
    return seen


CASES = {
    "full, of any lengths": ([3, 1, 9, 4], [5, 7, 2, 4], None, None),
    "causal": ([3, 1, 9, 4], [3, 1, 9, 4], None, 0),
    "causal, with keys before": ([3, 1, 5, 4], [3, 7, 9, 4], None, 0),
    "window": ([6, 1, 9, 4], [6, 3, 11, 4], 4, 2),
    "left": ([6, 1, 9, 4], [6, 3, 11, 4], 3, None),
    "right": ([6, 1, 9, 4], [6, 3, 11, 4], None, 2),
    "a bound between the lengths of segments": ([2, 11], [2, 11], 5, 4),
    "a bound that hides nothing": ([6, 1], [2, 5], 9, 9),
    "one query each": ([1, 1, 1], [4, 2, 7], None, None),
    "one": ([7], [9], 3, 0),
}


@pytest.mark.parametrize("kernel", ["cpu_flash", "math", "reference"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_by_one(kernel: str, case: tuple[list[int], list[int], int | None, int | None]) -> None:
    rows, cols, left, right = case
    segments = Segments(borders(rows), borders(cols), left, right)
    shape = Shape(q_len=sum(rows), k_len=sum(cols), heads=6, kv_heads=2, v_dim=24)
    q, k, v, dout = make(shape)
    call = prepare(q, k, v, AttentionSpec(kernel=kernel))
    with torch.no_grad(), calls() as log:
        out, lse = segments_forward(call, q, k, v, segments)
        grads = segments_backward(call, dout, q, k, v, out, lse, segments)
    assert (log.forward, log.backward) == (len(rows), len(rows))
    got = dict(zip(NAMES, (out, lse, *grads), strict=True))
    want = run(lambda *x: oracle(*x, all_seen(segments), call.scale), q, k, v, dout)
    assert max(error(got[name], want[name]) for name in NAMES) < 1e-5


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_at_once(
    name: str, case: tuple[list[int], list[int], int | None, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, cols, left, right = case
    segments = Segments(borders(rows), borders(cols), left, right)
    q, k, v, dout = make(Shape(q_len=sum(rows), k_len=sum(cols), heads=6, kv_heads=2, v_dim=24))
    with standing_in(name, STAND_INS[name], monkeypatch) as kernel:
        call = prepare(q, k, v, AttentionSpec(kernel=kernel))
        with torch.no_grad(), calls() as log:
            out, lse = segments_forward(call, q, k, v, segments)
            grads = segments_backward(call, dout, q, k, v, out, lse, segments)
    assert (log.forward, log.backward) == (1, 1)
    got = dict(zip(NAMES, (out, lse, *grads), strict=True))
    want = run(lambda *x: oracle(*x, all_seen(segments), call.scale), q, k, v, dout)
    assert max(error(got[each], want[each]) for each in NAMES) < 1e-5


UNLIKE = ((0, 4, 9, 17), (0, 17), (0, 1, 2, 17))


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("mask", [MaskSpec(causal=True), MaskSpec(window=(5, 2)), MaskSpec()], ids=MaskSpec.describe)
def test_rows_packed_unlike_are_one_call(name: str, mask: MaskSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, dout = make(Shape(batch=3, q_len=17, k_len=17, heads=6, kv_heads=2))
    want = [
        run(
            fast,
            *(x[row : row + 1] for x in (q, k, v, dout)),
            mask=replace(mask, cu_seqlens=borders_of_row),
            kernel="reference",
        )
        for row, borders_of_row in enumerate(UNLIKE)
    ]
    with standing_in(name, STAND_INS[name], monkeypatch) as kernel, calls() as log:
        got = run(fast, q, k, v, dout, mask=mask, cu_seqlens_by_row=UNLIKE, kernel=kernel)
    assert (log.forward, log.backward) == (1, 1)
    for each in NAMES:
        assert error(got[each], torch.cat([row[each] for row in want])) < 1e-5
