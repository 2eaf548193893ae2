"""The CUDA flash kernels' plumbing, on stand-ins that have the upstream signatures and window rules but run on CPU.

The real ones are tested in tests/gpu. What stands in computes in fp64 what FlashAttention documents, and insists on
what the real kernels silently assume: equal head dims that are a multiple of 8, dense last dims, a contiguous lse.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from test_kernels_blocks import flash_attention_2_sees, flash_attention_3_sees
from test_kernels_parity import MASKS, SHAPES, Shape, assert_close, fast, make, oracle, run
from torch import Tensor

from dsp_plugin.kernels import flash_attention, table
from dsp_plugin.kernels.flash_attention import FlashAttention2, FlashAttention3
from dsp_plugin.kernels.kernel import BlockSpec
from dsp_plugin.kernels.torch_flash import CudaFlash
from dsp_plugin.kernels.windowed import Window
from dsp_plugin.mask import MaskSpec

pytestmark = pytest.mark.timeout(60)

Rule = Callable[[Window, int, int], Tensor]


def dense_forward(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, left: int, right: int
) -> tuple[Tensor, Tensor]:
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    assert causal == (left == -1 and right == 0)
    scores, values = scores_of(rule, q, k, v, scale, left, right)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhij,bjhd->bihd", (scores - lse[..., None]).exp(), values)
    return out.to(q.dtype), lse.float()


def scores_of(
    rule: Rule, q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int
) -> tuple[Tensor, Tensor]:
    group = q.shape[2] // k.shape[2]
    keys, values = (x.double().repeat_interleave(group, 2) for x in (k, v))
    seen = rule(Window(left, right), q.shape[1], k.shape[1])
    return (torch.einsum("bihd,bjhd->bhij", q.double(), keys) * scale).masked_fill(~seen, -torch.inf), values


def dense_backward(
    rule: Rule,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    scale: float,
    left: int,
    right: int,
) -> None:
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    assert all(x.stride(-1) == 1 for x in (dout, out))
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    with torch.enable_grad():
        scores, values = scores_of(rule, q, k, v, scale, left, right)
        probabilities = (scores - lse.double()[..., None]).exp()
        # Differentiating at the given lse and out, as the flash backward does, rather than at this block's own.
        delta = torch.einsum("bihd,bihd->bhi", dout.double(), out.double())
        through_lse = probabilities * delta[..., None].detach()
        total = torch.einsum("bhij,bjhd,bihd->", probabilities, values, dout.double()) - through_lse.sum()
    for grad, value in zip(grads, torch.autograd.grad(total, (q, k, v)), strict=True):
        grad.copy_(value)


def fake_flash_attn_2() -> ModuleType:
    """A module with the signatures of flash_attn 2.7 and 2.8."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
        window = window_size_left, window_size_right
        out, lse = dense_forward(flash_attention_2_sees, q, k, v, softmax_scale, causal, *window)
        return out, lse, torch.empty(0), torch.empty(2)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, softcap, alibi_slopes) == (0.0, 0.0, None)
        tensors = dout, q, k, v, out, softmax_lse, (dq, dk, dv)
        dense_backward(flash_attention_2_sees, *tensors, softmax_scale, window_size_left, window_size_right)
        return torch.empty(0)

    module._flash_attn_forward = _flash_attn_forward
    module._flash_attn_backward = _flash_attn_backward
    return module


# Both generations of the operators' schemas (hopper/flash_api.cpp): with and without defaults.
FA3_OPTIONAL_BEFORE_SCALE = (
    "Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor? out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k"
)
FA3_SCHEMAS = {
    "early": (
        f"fwd(Tensor q, Tensor k, Tensor v, {FA3_OPTIONAL_BEFORE_SCALE}, float softmax_scale, bool is_causal, "
        "int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, float softcap=0.0, "
        "int num_splits=0, bool? pack_gqa=None, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)",
        "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq, "
        "Tensor(b!)? dk, Tensor(c!)? dv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, "
        "Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, float softmax_scale, bool is_causal, "
        "int window_size_left=-1, int window_size_right=-1, float softcap=0.0, bool deterministic=False, "
        "int sm_margin=0) -> Tensor",
    ),
    "late": (
        "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? out=None, float? softmax_scale=None, "
        "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, int attention_chunk=0, "
        "int num_splits=0, int sm_margin=0) -> (Tensor, Tensor, Tensor, Tensor)",
        "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!)? dq=None, "
        "Tensor(b!)? dk=None, Tensor(c!)? dv=None, Tensor? cu_seqlens_q=None, float? softmax_scale=None, "
        "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, float softcap=0.0, "
        "bool deterministic=False, int sm_margin=0) -> Tensor",
    ),
}


def register_fake_flash_attn_3(library: torch.library.Library, schemas: tuple[str, str]) -> None:
    fwd_schema, bwd_schema = schemas

    def bound(schema: str, arguments: tuple, keywords: dict) -> dict:
        # The dispatcher leaves out arguments that equal their default.
        declared = torch._C.parse_schema(f"flash_attn_3::{schema}").arguments
        given = dict(zip((argument.name for argument in declared), arguments, strict=False)) | keywords
        return {argument.name: argument.default_value for argument in declared} | given

    def fwd(*arguments, **keywords):
        a = bound(fwd_schema, arguments, keywords)
        window = a["window_size_left"], a["window_size_right"]
        call = a["q"], a["k"], a["v"], a["softmax_scale"], a["is_causal"], *window
        out, lse = dense_forward(flash_attention_3_sees, *call)
        return out, lse, torch.empty(0), torch.empty(0)

    def bwd(*arguments, **keywords):
        a = bound(bwd_schema, arguments, keywords)
        tensors = (a[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse"))
        grads = a["dq"], a["dk"], a["dv"]
        window = a["window_size_left"], a["window_size_right"]
        dense_backward(flash_attention_3_sees, *tensors, grads, a["softmax_scale"], *window)
        return torch.empty(0)

    library.define(fwd_schema)
    library.define(bwd_schema)
    library.impl("fwd", fwd, "CPU")
    library.impl("bwd", bwd, "CPU")


@pytest.fixture(params=["fa2", "fa3-early", "fa3-late"])
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a kernel of the table that now believes in its package and runs on CPU tensors."""
    name = request.param.split("-")[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(type(table.KERNELS[name]), "supports", lambda *_: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.8.3")
    flash_attention._import.cache_clear()
    flash_attention._distribution_version.cache_clear()
    if name == "fa2":
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", fake_flash_attn_2())
        yield name
    else:
        monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
        with torch.library._scoped_library("flash_attn_3", "DEF") as library:
            register_fake_flash_attn_3(library, FA3_SCHEMAS[request.param.split("-")[1]])
            yield name
    flash_attention._import.cache_clear()
    flash_attention._distribution_version.cache_clear()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks(stand_in: str, mask: MaskSpec) -> None:
    q, k, v, dout = make(Shape())
    assert_close(run(fast, q, k, v, dout, mask=mask, kernel=stand_in), oracle(q, k, v, dout, mask=mask), 1e-5)


@pytest.mark.parametrize("mask_name", ["full", "causal", "window", "window-left", "window-right"])
@pytest.mark.parametrize("shape_name", ["gqa", "short-q", "short-k", "dim-33", "narrow-v", "wide-v"])
def test_shapes(stand_in: str, mask_name: str, shape_name: str) -> None:
    q, k, v, dout = make(SHAPES[shape_name])
    mask = MASKS[mask_name]
    assert_close(run(fast, q, k, v, dout, mask=mask, kernel=stand_in), oracle(q, k, v, dout, mask=mask), 1e-5)


def test_strided_views_are_made_dense(stand_in: str) -> None:
    q, k, v, dout = make(Shape())
    views = [x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k, v)]
    got = run(fast, *views, dout.mT.contiguous().mT, mask=MASKS["causal"], kernel=stand_in)
    assert_close(got, oracle(q, k, v, dout, mask=MASKS["causal"]), 1e-5)


@pytest.mark.parametrize("window", [Window(-1, -1), Window(-1, 0), Window(3, 4)], ids=str)
def test_the_torch_operators_accept_what_cuda_flash_passes(window: Window) -> None:
    q, k = (torch.empty(2, n, h, 16, dtype=torch.bfloat16, device="meta") for n, h in ((5, 4), (9, 2)))
    kernel = CudaFlash()
    out, lse = kernel.window_forward(q, k, k, window, BlockSpec((None, None), 0.3))
    assert out.shape == q.shape
    assert (lse.shape, lse.dtype) == ((2, 4, 5), torch.float32)
    dq, dk, dv = kernel.window_backward(out, q, k, k, out, lse, window, BlockSpec((None, None), 0.3))
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, k.shape)


def test_an_old_or_broken_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    flash_attention._import.cache_clear()
    flash_attention._distribution_version.cache_clear()
    assert FlashAttention2().available() == (False, "package flash_attn is not installed")
    assert FlashAttention3().available() == (False, "package flash_attn_interface is not installed")

    flash_attention._import.cache_clear()
    flash_attention._distribution_version.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", fake_flash_attn_2())
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.5.9.post1")
    assert FlashAttention2().available() == (False, "flash_attn 2.5.9.post1 is older than 2.7.0")

    flash_attention._import.cache_clear()
    flash_attention._distribution_version.cache_clear()

    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c105ErrorC2E")

    monkeypatch.setattr(flash_attention.importlib, "import_module", broken)
    available, reason = FlashAttention2().available()
    assert not available
    assert "undefined symbol" in reason
    flash_attention._import.cache_clear()
    flash_attention._distribution_version.cache_clear()
