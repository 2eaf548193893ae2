"""The CUDA flash kernels' plumbing, on stand-ins that have the upstream signatures and window rules but run on CPU.

The real ones are tested in tests/gpu, segments in test_kernels_segments.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from flash_stand_ins import STAND_INS, fake_flash_attn_2, forget_packages, standing_in
from recorded_signatures import FLASH_ATTENTION_2
from test_kernels_parity import MASKS, SHAPES, Shape, assert_close, fast, make, oracle, run

from dsp_plugin.kernels import flash_attention
from dsp_plugin.kernels.flash_attention import FlashAttention2, FlashAttention3
from dsp_plugin.kernels.kernel import BlockSpec
from dsp_plugin.kernels.torch_flash import CudaFlash
from dsp_plugin.kernels.windowed import Window
from dsp_plugin.mask import MaskSpec

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=STAND_INS)
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with standing_in(request.param, STAND_INS[request.param], monkeypatch) as name:
        yield name


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
    forget_packages()
    assert FlashAttention2().available() == (False, "package flash_attn is not installed")
    assert FlashAttention3().available() == (False, "package flash_attn_interface is not installed")

    forget_packages()
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", fake_flash_attn_2(FLASH_ATTENTION_2[0]))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.5.9.post1")
    assert FlashAttention2().available() == (False, "flash_attn 2.5.9.post1 is older than 2.7.0")

    forget_packages()

    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c105ErrorC2E")

    monkeypatch.setattr(flash_attention.importlib, "import_module", broken)
    available, reason = FlashAttention2().available()
    assert not available
    assert "undefined symbol" in reason
    forget_packages()
