"""What the tests of our Triton kernels run in a process whose Triton interprets: see `test_triton_kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dsp_plugin.kernels import (
    KERNELS,
    AttentionSpec,
    attention,
    block_backward,
    block_forward,
    choose,
    dense_attention,
    prepare,
    triton_launch,
)
from dsp_plugin.kernels.dropout import Dropout
from dsp_plugin.kernels.kernel import BlockSpec
from dsp_plugin.kernels.merge import empty_state, merge_
from dsp_plugin.mask import MaskSpec


@contextmanager
def small_tiles() -> Iterator[None]:
    """So that short sequences have some that are seen wholly, in part and not at all."""
    small = {key: triton_launch.Sizes(16, 32, 4, 1) for key in triton_launch.FORWARD}
    with mock.patch.dict(triton_launch.FORWARD, small), mock.patch.dict(triton_launch.OF_QUERIES, small):
        yield


@dataclass(frozen=True)
class Case:
    """An attention; ``wide`` is the head dim of v."""

    name: str
    mask: MaskSpec = field(default_factory=MaskSpec)
    queries: int = 67
    keys: int = 67
    batch: int = 1
    heads: int = 1
    kv_heads: int = 1
    dim: int = 16
    wide: int = 16
    dropout: float = 0.3
    dtype: torch.dtype = torch.float32


# The interpreter multiplies the bits of bf16 as integers: that is for tests/gpu.
CASES = (
    Case("full", dropout=0.0),
    Case("causal", MaskSpec(causal=True)),
    Case("window", MaskSpec(window=(20, 11)), batch=2, heads=2, kv_heads=1, queries=37, keys=37),
    Case("window to the left", MaskSpec(window=(9, None)), heads=4, kv_heads=2, queries=33, keys=35),
    Case("causal window", MaskSpec(causal=True, window=(19, 0)), dim=33, wide=24),
    Case("one key", MaskSpec(causal=True), queries=1, keys=1),
    Case("more queries than keys", MaskSpec(window=(None, 3)), queries=70, keys=20, wide=8),
    Case("packed", MaskSpec(causal=True, cu_seqlens=(0, 1, 30, 67)), dropout=0.1),
    Case("fp16", MaskSpec(causal=True), dtype=torch.float16, dim=40, heads=3, kv_heads=1, queries=35, keys=35),
)


def inputs(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)

    def normal(length: int, heads: int, dim: int) -> Tensor:
        return torch.randn(case.batch, length, heads, dim, generator=generator, dtype=torch.float64).to(case.dtype)

    q, k = normal(case.queries, case.heads, case.dim), normal(case.keys, case.kv_heads, case.dim)
    v, dout = normal(case.keys, case.kv_heads, case.wide), normal(case.queries, case.heads, case.wide)
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout]


def told(case: Case) -> dict[str, Any]:
    return {"mask": case.mask, "dropout_p": case.dropout, "dropout_seed": -(2**62) + 5, "head_offset": 3}


@small_tiles()
def equals_the_oracle(case: Case) -> None:
    q, k, v, dout = inputs(case)
    out, lse = attention(q, k, v, AttentionSpec(kernel="triton", **told(case)), return_lse=True)
    got = [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, lse = dense_attention(*exact, **told(case))
    want = [out, lse, *torch.autograd.grad(out, exact, dout.double())]
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3}[case.dtype]
    for name, mine, theirs in zip(("out", "lse", "dq", "dk", "dv"), got, want, strict=True):
        assert mine.isfinite().equal(theirs.isfinite()), name
        finite = theirs.isfinite()
        error = (mine.double() - theirs)[finite].abs().max() / theirs[finite].abs().max().clamp_min(0.25)
        assert error < tolerance, (name, error.item())


@small_tiles()
def keeps_what_torch_keeps(start: int) -> None:
    """Read off by one-hot values, where every weight is alike: strided runs that begin anywhere, on both sides."""
    rows, cols = 19, 37
    drop = Dropout(0.4, 2**63 + 9, range(5, 5 + 3 * rows, 3), range(start, start + 3 * cols, 3), 7, 2**33)
    q, k = torch.zeros(1, rows, 2, 16), torch.zeros(1, cols, 1, 16)
    v = torch.eye(cols).view(1, cols, 1, cols)
    out, _ = KERNELS["triton"].forward(q, k, v, BlockSpec((None, None), 1.0, drop))
    assert torch.equal(out.transpose(1, 2) != 0, drop.keep(1, 2, "cpu"))
    dout = torch.eye(rows, cols)[None, :, None].expand(1, rows, 2, cols)
    lse = torch.zeros(1, 2, rows)
    _, _, dv = KERNELS["triton"].backward(dout, q, k, v, torch.zeros_like(out), lse, BlockSpec((None, None), 1.0, drop))
    kept = drop.keep(1, 2, "cpu").sum(1)[0].T.float() * drop.scale
    torch.testing.assert_close(dv[0, :, 0, :rows], kept)


@small_tiles()
def takes_strided_inputs() -> None:
    case = Case("strided", MaskSpec(causal=True), batch=2, heads=2, kv_heads=2, queries=33, keys=33)
    joined = torch.randn(2, 33, 6, 16, generator=torch.Generator().manual_seed(1))
    spec = AttentionSpec(kernel="triton", **told(case))
    views = joined.split(2, 2)
    apart = [x.contiguous() for x in views]
    assert torch.equal(attention(*views, spec), attention(*apart, spec))
    turned = [x.mT.contiguous().mT for x in views]
    assert torch.equal(attention(*turned, spec), attention(*apart, spec))


def auto_leaves_the_interpreter_alone() -> None:
    assert choose(AttentionSpec(dropout_p=0.1, dropout_seed=1), "cpu", torch.float32, 64).name == "math"


def merges(dtype: torch.dtype) -> None:
    """As torch merges: rows that are empty on either side or on both, views, a block of a lower precision."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(2, 9, 3, 24, generator=generator), torch.randn(2, 3, 9, generator=generator)
    block_out, block_lse = torch.randn(2, 5, 3, 24, generator=generator).to(dtype), torch.randn(2, 3, 5)
    for row, (mine, others) in enumerate(((True, False), (False, True), (True, True))):
        if mine:
            whole[0][:, 2 + row], whole[1][:, :, 2 + row] = 0.0, -torch.inf
        if others:
            block_out[:, row], block_lse[:, :, row] = 0.0, -torch.inf
    want = [x.clone() for x in whole]
    merge_(want[0][:, 2:7], want[1][:, :, 2:7], block_out, block_lse)
    got = [x.clone() for x in whole]
    torch.ops.dsp_plugin.triton_merge_(got[0][:, 2:7], got[1][:, :, 2:7], block_out, block_lse)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6)
    assert got[1][:, :, 4].isneginf().all()
    assert not got[0][:, 4].any()


@small_tiles()
def shards_add_up(size: int) -> None:
    """Runs of keys and queries, as ranks of a ring have them, merged and summed: what one call gives for the whole."""
    case = Case("ring", MaskSpec(causal=True), batch=1, heads=2, queries=40, keys=40)
    q, k, v, dout = (x.detach() for x in inputs(case))
    call = prepare(q, k, v, AttentionSpec(kernel="triton", **told(case)))
    whole = range(40)
    want_out, want_lse = block_forward(call, q, k, v, whole, whole)
    want = block_backward(call, dout, q, k, v, want_out, want_lse, whole, whole)
    # Striped, so that no run is contiguous.
    runs = [range(rank, 40, size) for rank in range(size)]
    cut = [slice(run.start, None, size) for run in runs]
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for rows, mine in zip(runs, cut, strict=True):
        out, lse = empty_state(q[:, mine], v)
        for cols, theirs in zip(runs, cut, strict=True):
            merge_(out, lse, *block_forward(call, q[:, mine], k[:, theirs], v[:, theirs], rows, cols))
        torch.testing.assert_close(out, want_out[:, mine], rtol=1e-5, atol=1e-5)
        for cols, theirs in zip(runs, cut, strict=True):
            given = dout[:, mine], q[:, mine], k[:, theirs], v[:, theirs], out, lse
            for total, share, at in zip(
                grads, block_backward(call, *given, rows, cols), (mine, theirs, theirs), strict=True
            ):
                total[:, at] += share
    for mine, theirs in zip(grads, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
