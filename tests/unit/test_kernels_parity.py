"""Every kernel that runs here equals the fp64 dense oracle: output, lse and all gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.kernels import KERNELS, AttentionSpec, attention, dense_attention
from dsp_plugin.kernels.chunked import Math
from dsp_plugin.kernels.reference import dense_mask
from dsp_plugin.mask import MaskSpec

pytestmark = pytest.mark.timeout(60)

# These tensors are tiny: more threads only wait for each other, for seconds where cores are shared.
torch.set_num_threads(1)

KERNELS_ON_CPU = ("cpu_flash", "math", "reference")
NAMES = ("out", "lse", "dq", "dk", "dv")


# A largest gradient below this, of numbers drawn with a variance of 1, is what is left of terms that cancel.
CANCELLED = 0.25


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention: batch, query and key lengths, query and kv heads, head dims of q/k and of v."""

    batch: int = 2
    q_len: int = 67
    k_len: int = 67
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    v_dim: int = 16


def make(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random q, k, v (leaves) and an output gradient."""
    g = torch.Generator().manual_seed(seed)

    def normal(n: int, heads: int, dim: int) -> Tensor:
        return torch.randn(shape.batch, n, heads, dim, generator=g, dtype=torch.float64).to(dtype)

    q = normal(shape.q_len, shape.heads, shape.dim).requires_grad_()
    k = normal(shape.k_len, shape.kv_heads, shape.dim).requires_grad_()
    v = normal(shape.k_len, shape.kv_heads, shape.v_dim).requires_grad_()
    return q, k, v, normal(shape.q_len, shape.heads, shape.v_dim)


def run(fn, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **arguments) -> dict[str, Tensor]:
    """Output, lse and gradients by name."""
    out, lse = fn(q, k, v, **arguments)
    grads = torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=True))


def fast(q: Tensor, k: Tensor, v: Tensor, **arguments) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, AttentionSpec(**arguments), return_lse=True)


def oracle(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, **arguments) -> dict[str, Tensor]:
    """All that `run` returns, in fp64, and what ``dq subtracts`` and ``dk subtracts``.

    The gradient of a score is its weight times the difference of two dot products with the output's gradient: the
    value's and the output's. Where a query sees one key they are equal, and what a kernel leaves of the gradient is
    their rounding. The part of the second is the gradient of lse times that product.
    """
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    want = run(dense_attention, q, k, v, dout, **arguments)
    lse = dense_attention(q, k, v, **arguments)[1]
    terms = torch.autograd.grad(lse, (q, k), (dout.double() * want["out"]).sum(-1).mT)
    return want | dict(zip(("dq subtracts", "dk subtracts"), terms, strict=True))


def error(got: Tensor, want: Tensor, terms: Tensor | None = None) -> float:
    """Largest deviation relative to the largest expected magnitude; infinities must be equal.

    Relative to the terms where they cancel, that is, where hardly anything is expected.
    """
    assert got.shape == want.shape
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite), "infinite or NaN where the oracle is finite, or the reverse"
    assert torch.equal(got[~finite].double(), want[~finite].double())
    got, want = got[finite].double(), want[finite].double()
    scale = want.abs().max().item() if want.numel() else 0.0
    if scale < CANCELLED and terms is not None and terms.numel():
        scale = max(scale, terms.abs().max().item())
    return (got - want).abs().max().item() / scale if scale else float(bool(got.any()))


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    errors = {name: error(got[name], want[name], want.get(f"{name} subtracts")) for name in NAMES}
    assert max(errors.values()) <= tolerance, errors


MASKS = {
    "full": MaskSpec(),
    "causal": MaskSpec(causal=True),
    "window": MaskSpec(window=(5, 3)),
    "window-left": MaskSpec(window=(9, None)),
    "window-right": MaskSpec(window=(None, 4)),
    "diagonal": MaskSpec(window=(0, 0)),
    "causal-window": MaskSpec(causal=True, window=(7, None)),
    "packed": MaskSpec(cu_seqlens=(0, 1, 23, 23, 60, 67)),
    "packed-causal": MaskSpec(causal=True, cu_seqlens=(0, 13, 67)),
    "packed-window": MaskSpec(window=(6, 2), cu_seqlens=(0, 31, 50, 67)),
    "packed-causal-window": MaskSpec(causal=True, window=(6, 0), cu_seqlens=(0, 31, 50, 67)),
}


@pytest.mark.parametrize("kernel", KERNELS_ON_CPU)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks(kernel: str, mask: MaskSpec) -> None:
    q, k, v, dout = make(Shape())
    assert_close(run(fast, q, k, v, dout, mask=mask, kernel=kernel), oracle(q, k, v, dout, mask=mask), 1e-5)


SHAPES = {
    "mha": Shape(heads=3, kv_heads=3),
    "mqa": Shape(heads=6, kv_heads=1),
    "gqa": Shape(heads=6, kv_heads=2),
    "one-token": Shape(q_len=1, k_len=1),
    "short-q": Shape(q_len=5, k_len=40),
    "short-k": Shape(q_len=40, k_len=5),
    "dim-8": Shape(dim=8, v_dim=8),
    "dim-33": Shape(dim=33, v_dim=33),
    "dim-64": Shape(dim=64, v_dim=64),
    "narrow-v": Shape(dim=24, v_dim=16),
    "wide-v": Shape(dim=8, v_dim=33),
}


@pytest.mark.parametrize("kernel", KERNELS_ON_CPU)
@pytest.mark.parametrize("mask_name", ["full", "causal", "window"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(kernel: str, mask_name: str, shape: Shape) -> None:
    q, k, v, dout = make(shape)
    arguments = {"mask": MASKS[mask_name], "scale": 0.37}
    assert_close(run(fast, q, k, v, dout, kernel=kernel, **arguments), oracle(q, k, v, dout, **arguments), 1e-5)


@pytest.mark.parametrize("kernel", KERNELS_ON_CPU)
def test_queries_that_see_no_key_have_zero_output_and_gradient(kernel: str) -> None:
    q, k, v, dout = make(Shape(q_len=20, k_len=6))
    mask = MaskSpec(window=(3, 0))
    got = run(fast, q, k, v, dout, mask=mask, kernel=kernel)
    assert torch.all(got["out"][:, 9:] == 0)
    assert torch.all(got["lse"][:, :, 9:] == -torch.inf)
    assert torch.all(got["dq"][:, 9:] == 0)
    assert_close(got, oracle(q, k, v, dout, mask=mask), 1e-5)


@pytest.mark.parametrize("kernel", KERNELS_ON_CPU)
@pytest.mark.parametrize("q_per_kv", [(3, 1), (1, 1, 2), (0, 4), (2, 0, 2), (2, 2)])
def test_kv_heads_that_serve_uneven_numbers_of_query_heads(kernel: str, q_per_kv: tuple[int, ...]) -> None:
    q, k, v, dout = make(Shape(kv_heads=len(q_per_kv)))
    arguments = {"mask": MaskSpec(causal=True), "q_per_kv": q_per_kv}
    assert_close(run(fast, q, k, v, dout, kernel=kernel, **arguments), oracle(q, k, v, dout, **arguments), 1e-5)


@pytest.mark.parametrize("kernel", ["cpu_flash", "math"])
@pytest.mark.parametrize(
    "mask",
    [
        MaskSpec(causal=True),
        MaskSpec(window=(40, 300)),
        MaskSpec(causal=True, window=(700, 0)),
        MaskSpec(window=(900, 7)),
    ],
    ids=MaskSpec.describe,
)
def test_lengths_that_span_many_tiles(kernel: str, mask: MaskSpec) -> None:
    q, k, v, dout = make(Shape(batch=1, q_len=1301, k_len=1301, heads=2, kv_heads=1, dim=8, v_dim=8))
    assert_close(run(fast, q, k, v, dout, mask=mask, kernel=kernel), oracle(q, k, v, dout, mask=mask), 1e-5)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_math_in_small_tiles(monkeypatch: pytest.MonkeyPatch, mask: MaskSpec, dropout_p: float) -> None:
    monkeypatch.setitem(KERNELS, "math", Math(tile_elements=1000, tile_cols=16))
    q, k, v, dout = make(Shape(v_dim=24))
    arguments = {"mask": mask, "dropout_p": dropout_p, "dropout_seed": 4}
    assert_close(run(fast, q, k, v, dout, kernel="math", **arguments), oracle(q, k, v, dout, **arguments), 1e-5)


@pytest.mark.parametrize("kernel", ["cpu_flash", "math"])
def test_fp64_stays_fp64(kernel: str) -> None:
    q, k, v, dout = make(Shape(q_len=21, k_len=21), torch.float64)
    mask = MaskSpec(causal=True, window=(4, 0))
    got = run(fast, q, k, v, dout, mask=mask, kernel=kernel)
    assert got["lse"].dtype == torch.float64
    assert_close(got, oracle(q, k, v, dout, mask=mask), 1e-13)


@pytest.mark.parametrize("kernel", ["cpu_flash", "math"])
@pytest.mark.parametrize("mask_name", ["full", "causal", "window", "packed-causal"])
def test_bf16_is_no_worse_than_torch_in_bf16(kernel: str, mask_name: str) -> None:
    q, k, v, dout = make(Shape(dim=32, v_dim=32), torch.bfloat16)
    mask = MASKS[mask_name]
    want = oracle(q, k, v, dout, mask=mask)
    got = run(fast, q, k, v, dout, mask=mask, kernel=kernel)
    assert got["out"].dtype == torch.bfloat16
    assert got["lse"].dtype == torch.float32
    assert error(got["lse"], want["lse"]) < 1e-4

    def unsharded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        seen = dense_mask(mask, torch.arange(q.shape[1]), torch.arange(k.shape[1]))
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=seen, enable_gqa=True)
        return out.transpose(1, 2), want["lse"]

    base = run(unsharded, q, k, v, dout)
    for name in ("out", "dq", "dk", "dv"):
        assert error(got[name], want[name]) <= 1.5 * error(base[name], want[name]) + 1e-3, name


@pytest.mark.parametrize("kernel", ["auto", *KERNELS_ON_CPU])
@pytest.mark.parametrize("empty", [{"q_len": 0}, {"k_len": 0}, {"heads": 0, "kv_heads": 0}, {"batch": 0}], ids=str)
def test_empty_inputs_give_empty_or_zero_results(kernel: str, empty: dict[str, int]) -> None:
    shape = Shape(**{"q_len": 3, "k_len": 5, "v_dim": 8, **empty})
    q, k, v, dout = make(shape)
    got = run(fast, q, k, v, dout, mask=MaskSpec(causal=True), kernel=kernel)
    assert got["out"].shape == (shape.batch, shape.q_len, shape.heads, 8)
    assert got["lse"].shape == (shape.batch, shape.heads, shape.q_len)
    assert torch.all(got["lse"] == -torch.inf)
    for name in ("out", "dq", "dk", "dv"):
        assert not got[name].any()


@pytest.mark.parametrize("kernel", KERNELS_ON_CPU)
def test_strided_views_are_read_correctly(kernel: str) -> None:
    q, k, v, dout = make(Shape(dim=16, v_dim=16))
    transposed = [x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v)]
    got = run(fast, *transposed, dout.mT.contiguous().mT, mask=MASKS["window"], kernel=kernel)
    assert_close(got, oracle(q, k, v, dout, mask=MASKS["window"]), 1e-5)
    out = fast(q, k, v, mask=MASKS["causal"], kernel=kernel)[0]
    expanded = torch.autograd.grad(out.sum(), (q, k, v))
    want = oracle(q, k, v, torch.ones_like(dout), mask=MASKS["causal"])
    assert max(error(g, want[n]) for g, n in zip(expanded, ("dq", "dk", "dv"), strict=True)) < 1e-5


@pytest.mark.parametrize("kernel", ["cpu_flash", "math"])
def test_autocast_casts_inputs_but_not_the_accumulation(kernel: str) -> None:
    q, k, v, dout = make(Shape())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(fast, q, k, v, dout, mask=MaskSpec(causal=True), kernel=kernel)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    want = run(fast, *rounded, dout.bfloat16(), mask=MaskSpec(causal=True), kernel=kernel)
    assert torch.equal(got["out"], want["out"])
    assert torch.equal(got["lse"], want["lse"])
    assert got["dq"].dtype == torch.float32
    assert error(got["dq"], want["dq"]) < 1e-6


def test_gradcheck_of_the_oracle() -> None:
    q, k, v, _ = make(Shape(batch=1, q_len=6, k_len=5, dim=3, v_dim=2), torch.float64)

    def out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v, mask=MaskSpec(window=(1, 2)), dropout_p=0.2, dropout_seed=1)[0]

    assert torch.autograd.gradcheck(out, (q, k, v))


def test_document_borders_must_end_at_the_sequence_length() -> None:
    q, k, v, _ = make(Shape(q_len=10, k_len=10))
    with pytest.raises(SequenceParallelConfigError, match="last border is 8 but the sequence has 10"):
        attention(q, k, v, AttentionSpec(MaskSpec(cu_seqlens=(0, 4, 8))))
