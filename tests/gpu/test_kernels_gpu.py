"""The CUDA kernels equal the fp64 dense oracle to bf16 accuracy, and blocks merge to the whole."""

from __future__ import annotations

import pytest
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
    empty_state,
    merge_,
    prepare,
)
from dsp_plugin.kernels.dropout import Dropout
from dsp_plugin.mask import MaskSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FLASH = ("fa3", "fa2", "cuda_flash", "triton")
LENGTH = 301
MASKS = [
    MaskSpec(),
    MaskSpec(causal=True),
    MaskSpec(causal=True, window=(40, 0)),
    MaskSpec(window=(17, 30)),
    MaskSpec(window=(20, None)),
    MaskSpec(causal=True, cu_seqlens=(0, 1, 130, 301)),
    MaskSpec(window=(9, 5), cu_seqlens=(0, 64, 301)),
]


def usable(name: str, head_dim: int, v_head_dim: int, dropout_p: float = 0.0) -> str:
    """The kernel's name; skips where this machine lacks it."""
    available, reason = KERNELS[name].available()
    if not available:
        pytest.skip(f"{name}: {reason}")
    spec = AttentionSpec(dropout_p=dropout_p, dropout_seed=0)
    refusal = KERNELS[name].supports(torch.bfloat16, torch.device("cuda"), head_dim, v_head_dim, spec)
    if refusal is not None:
        pytest.skip(f"{name}: {refusal}")
    return name


def make(
    q_len: int = LENGTH, k_len: int = LENGTH, heads: int = 4, kv_heads: int = 2, dim: int = 64, v_dim: int = 64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator("cuda").manual_seed(0)

    def normal(n: int, h: int, d: int) -> Tensor:
        return torch.randn(2, n, h, d, generator=g, device="cuda", dtype=torch.bfloat16)

    q, k, v = normal(q_len, heads, dim), normal(k_len, kv_heads, dim), normal(k_len, kv_heads, v_dim)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), normal(q_len, heads, v_dim)


def oracle(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **arguments) -> list[Tensor]:
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, lse = dense_attention(q, k, v, **arguments)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())]


def assert_bf16_close(got: list[Tensor], want: list[Tensor]) -> None:
    """lse to fp32 accuracy; the rest to a few bf16 roundings of the largest value."""
    tolerances = {"out": 1e-2, "lse": 1e-4, "dq": 2e-2, "dk": 2e-2, "dv": 2e-2}
    for (name, tolerance), g, w in zip(tolerances.items(), got, want, strict=True):
        finite = w.isfinite()
        assert torch.equal(g.isfinite(), finite), name
        error = (g[finite].double() - w[finite]).abs().max() / w[finite].abs().max().clamp_min(0.25)
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("kernel", FLASH)
@pytest.mark.parametrize("mask", MASKS, ids=MaskSpec.describe)
def test_masks(kernel: str, mask: MaskSpec) -> None:
    name = usable(kernel, 64, 64)
    q, k, v, dout = make()
    out, lse = attention(q, k, v, AttentionSpec(mask, kernel=name), return_lse=True)
    got = [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]
    assert_bf16_close(got, oracle(q, k, v, dout, mask=mask))


@pytest.mark.parametrize("kernel", FLASH)
@pytest.mark.parametrize("mask", MASKS[:5], ids=MaskSpec.describe)
@pytest.mark.parametrize(
    "shape",
    [
        {"q_len": 40, "k_len": 300},
        {"q_len": 300, "k_len": 40},
        {"q_len": 1, "k_len": 7},
        {"heads": 6, "kv_heads": 1},
        {"dim": 33, "v_dim": 33},
        {"dim": 192, "v_dim": 128},
        {"dim": 24, "v_dim": 40},
        {"dim": 256, "v_dim": 256},
    ],
    ids=str,
)
def test_shapes(kernel: str, mask: MaskSpec, shape: dict[str, int]) -> None:
    name = usable(kernel, shape.get("dim", 64), shape.get("v_dim", 64))
    q, k, v, dout = make(**shape)
    out, lse = attention(q, k, v, AttentionSpec(mask, kernel=name), return_lse=True)
    got = [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]
    assert_bf16_close(got, oracle(q, k, v, dout, mask=mask))


@pytest.mark.parametrize("kernel", [*FLASH, "math"])
@pytest.mark.parametrize("mask", MASKS, ids=MaskSpec.describe)
def test_blocks_merge_to_the_whole(kernel: str, mask: MaskSpec) -> None:
    name = usable(kernel, 64, 64)
    q, k, v, dout = make()
    want = oracle(q, k, v, dout, mask=mask)
    q, k, v = (x.detach() for x in (q, k, v))
    call = prepare(q, k, v, AttentionSpec(mask, kernel=name))
    runs = [range(0, 100), range(100, 180), range(180, LENGTH)]
    out, lse = empty_state(q, v)
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v)]
    for rows in runs:
        at_rows = slice(rows.start, rows.stop)
        for cols in runs:
            at_cols = slice(cols.start, cols.stop)
            block = block_forward(call, q[:, at_rows], k[:, at_cols], v[:, at_cols], rows, cols)
            merge_(out[:, at_rows], lse[:, :, at_rows], *block)
    rounded = out.to(q.dtype)
    for rows in runs:
        at_rows = slice(rows.start, rows.stop)
        for cols in runs:
            at_cols = slice(cols.start, cols.stop)
            inputs = dout[:, at_rows], q[:, at_rows], k[:, at_cols], v[:, at_cols]
            shares = block_backward(call, *inputs, rounded[:, at_rows], lse[:, :, at_rows], rows, cols)
            for grad, share, run in zip(grads, shares, (at_rows, at_cols, at_cols), strict=True):
                grad[:, run] += share
    assert_bf16_close([out, lse, *grads], want)


@pytest.mark.parametrize("mask", MASKS, ids=MaskSpec.describe)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_math_in_fp32(mask: MaskSpec, dropout_p: float) -> None:
    q, k, v, dout = (x.detach().float().requires_grad_() for x in make(dim=33, v_dim=24))
    arguments = {"mask": mask, "dropout_p": dropout_p, "dropout_seed": 3, "q_per_kv": (1, 3)}
    out, lse = attention(q, k, v, AttentionSpec(kernel="math", **arguments), return_lse=True)
    got = [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]
    for g, w in zip(got, oracle(q, k, v, dout, **arguments), strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)


def test_dropout_is_the_same_on_cpu_and_cuda() -> None:
    dropout = Dropout(0.3, -7, range(5, 90), range(3, 200, 2), head_offset=2, batch_offset=9)
    assert torch.equal(dropout.keep(2, 3, "cuda").cpu(), dropout.keep(2, 3, "cpu"))


def test_auto_chooses_a_flash_kernel_for_bf16_and_math_for_the_rest() -> None:
    if torch.cuda.get_device_capability() >= (8, 0):
        assert choose(AttentionSpec(), "cuda", torch.bfloat16, 64).name in FLASH
    assert choose(AttentionSpec(), "cuda", torch.float32, 64).name == "math"
    dropping = choose(AttentionSpec(dropout_p=0.1, dropout_seed=1), "cuda", torch.bfloat16, 64).name
    assert dropping == ("triton" if KERNELS["triton"].available()[0] else "math")
