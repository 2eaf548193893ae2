"""Our Triton kernels on a real device: dropout against the oracle and against torch's, determinism, merges, seeds."""

from __future__ import annotations

import pytest
import torch
from test_kernels_gpu import MASKS, assert_bf16_close, make, oracle, usable

from dsp_plugin.kernels import KERNELS, AttentionSpec, attention, merge_
from dsp_plugin.kernels.dropout import Dropout
from dsp_plugin.kernels.kernel import BlockSpec
from dsp_plugin.mask import MaskSpec
from dsp_plugin.training.randomness import draw_seed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DROPPING = {"dropout_p": 0.2, "dropout_seed": -9}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [(64, 64), (33, 24), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=MaskSpec.describe)
def test_dropout(mask: MaskSpec, dims: tuple[int, int], dtype: torch.dtype) -> None:
    name = usable("triton", *dims, dropout_p=0.2)
    q, k, v, dout = (x.detach().to(dtype).requires_grad_() for x in make(dim=dims[0], v_dim=dims[1]))
    out, lse = attention(q, k, v, AttentionSpec(mask, kernel=name, **DROPPING), return_lse=True)
    got = [out, lse, *torch.autograd.grad(out, (q, k, v), dout)]
    assert_bf16_close(got, oracle(q, k, v, dout, mask=mask, **DROPPING))


@pytest.mark.parametrize("start", [0, 2**31 - 7, 2**32 - 40, 2**40])
def test_it_keeps_what_torch_keeps(start: int) -> None:
    usable("triton", 64, 64)
    drop = Dropout(0.4, 2**63 + 9, range(5, 5 + 3 * 190, 3), range(start, start + 3 * 150, 3), 7, 2**33)
    q, k = torch.zeros(1, 190, 2, 16, device="cuda"), torch.zeros(1, 150, 1, 16, device="cuda")
    v = torch.eye(150, device="cuda").view(1, 150, 1, 150)
    out, _ = KERNELS["triton"].forward(q, k, v, BlockSpec((None, None), 1.0, drop))
    assert torch.equal(out.transpose(1, 2).cpu() != 0, drop.keep(1, 2, "cpu"))


def test_gradients_are_the_same_on_every_run() -> None:
    name = usable("triton", 64, 64)
    q, k, v, dout = make(q_len=1030, k_len=1030)
    spec = AttentionSpec(MaskSpec(causal=True), kernel=name, **DROPPING)
    runs = [torch.autograd.grad(attention(q, k, v, spec), (q, k, v), dout) for _ in range(3)]
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))


def test_merges() -> None:
    usable("triton", 64, 64)
    out, lse = torch.randn(2, 70, 3, 24, device="cuda"), torch.randn(2, 3, 70, device="cuda")
    block = torch.randn(2, 70, 3, 24, device="cuda").bfloat16(), torch.randn(2, 3, 70, device="cuda")
    out[:, 3:5], lse[:, :, 3:5] = 0.0, -torch.inf
    block[0][:, 4:6], block[1][:, :, 4:6] = 0.0, -torch.inf
    want = [x.cpu() for x in (out, lse)]
    merge_(*want, *(x.cpu() for x in block))
    merge_(out, lse, *block)
    for mine, theirs in zip((out, lse), want, strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-5, atol=1e-5)


def test_a_seed_is_drawn_without_waiting_for_the_device() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    torch.randn(1, device=device)
    state = torch.cuda.get_rng_state(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        seeds = [draw_seed(device) for _ in range(20)]
        torch.cuda.set_rng_state(state, device)
        assert [draw_seed(device) for _ in range(20)] == seeds
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(set(seeds)) == 20
