"""Which kernel runs, what a forced one refuses, and what doctor is told."""

from __future__ import annotations

import re

import pytest
import torch
from test_kernels_parity import Shape, make

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.kernels import KERNELS, AttentionSpec, attention, choose, describe
from dsp_plugin.kernels.flash_attention import FlashAttention2, FlashAttention3
from dsp_plugin.kernels.torch_flash import CudaFlash
from dsp_plugin.mask import MaskSpec

pytestmark = pytest.mark.timeout(30)

DROPPING = AttentionSpec(dropout_p=0.1, dropout_seed=1)


def test_auto_prefers_the_cpu_operator_and_falls_back_to_math() -> None:
    assert choose(AttentionSpec(), "cpu", torch.float32, 64).name == "cpu_flash"
    assert choose(AttentionSpec(), "cpu", torch.bfloat16, 64, 48).name == "cpu_flash"
    assert choose(DROPPING, "cpu", torch.float32, 64).name == "math"
    assert choose(AttentionSpec(), "meta", torch.float32, 64).name == "math"


@pytest.mark.parametrize("name", ["math", "reference", "cpu_flash"])
def test_a_forced_kernel_is_used(name: str) -> None:
    assert choose(AttentionSpec(kernel=name), "cpu", torch.float32, 64).name == name


@pytest.mark.parametrize(
    ("kernel", "device", "dtype", "message"),
    [
        (
            "cpu_flash",
            "meta",
            torch.float32,
            "cpu_flash cannot serve this: it runs on the cpu, the tensors are on meta",
        ),
        ("cpu_flash", "cpu", torch.float8_e4m3fn, "it computes in float64, float32, bfloat16 or float16"),
        ("math", "cpu", torch.int64, "needs a floating point dtype"),
    ],
)
def test_refusals_name_the_reason_and_the_values(kernel: str, device: str, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        choose(AttentionSpec(kernel=kernel), device, dtype, 64)
    assert f"kernel='{kernel}'" in str(caught.value)
    assert str(dtype) in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="states what happens without CUDA")
@pytest.mark.parametrize("kernel", ["fa2", "fa3", "cuda_flash"])
def test_cuda_kernels_are_refused_without_cuda(kernel: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{kernel} cannot serve this: no cuda device") as caught:
        choose(AttentionSpec(kernel=kernel), "cpu", torch.bfloat16, 64)
    assert "Set kernel to 'auto' or one that can: cpu_flash, math, reference" in str(caught.value)


@pytest.mark.parametrize(
    ("kernel", "dtype", "dims", "spec", "capability", "message"),
    [
        (FlashAttention2(), torch.float32, (64, 64), AttentionSpec(), (8, 0), "float16 or bfloat16"),
        (FlashAttention2(), torch.bfloat16, (64, 264), AttentionSpec(), (8, 0), "head dim 264 exceeds 256"),
        (
            CudaFlash(),
            torch.bfloat16,
            (64, 64),
            DROPPING,
            (8, 0),
            "dropout would depend on how the sequence is sharded",
        ),
        (CudaFlash(), torch.bfloat16, (64, 64), AttentionSpec(), (7, 5), r"needs compute capability \(8, 0\)"),
        (CudaFlash(), torch.bfloat16, (256, 64), AttentionSpec(), (8, 9), "head dim 256 does not fit"),
        (FlashAttention3(), torch.bfloat16, (64, 64), AttentionSpec(), (8, 0), "built for Hopper"),
        (FlashAttention3(), torch.bfloat16, (64, 64), AttentionSpec(), (10, 0), "built for Hopper"),
    ],
)
def test_cuda_kernels_know_their_limits(
    monkeypatch: pytest.MonkeyPatch, kernel, dtype, dims, spec, capability, message
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert re.search(message, kernel.supports(dtype, torch.device("cuda:0"), *dims, spec))
    good_capability = (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: good_capability)
    assert kernel.supports(torch.bfloat16, torch.device("cuda:0"), 192, 128, AttentionSpec()) is None


def test_a_deterministic_run_takes_no_kernel_without_a_deterministic_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    device = torch.device("cuda:0")
    assert FlashAttention3().supports(torch.bfloat16, device, 256, 64, AttentionSpec()) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert FlashAttention3().supports(torch.bfloat16, device, 192, 192, AttentionSpec()) is None
        refusal = FlashAttention3().supports(torch.bfloat16, device, 64, 256, AttentionSpec())
    finally:
        torch.use_deterministic_algorithms(False)
    assert refusal is not None
    assert "up to 192, not 256" in refusal


def test_unknown_kernels_name_the_nearest() -> None:
    with pytest.raises(SequenceParallelConfigError, match=r"kernel='cpuflash': kernels are auto, fa3.*'cpu_flash'"):
        choose(AttentionSpec(kernel="cpuflash"), "cpu", torch.float32, 64)


def test_describe_has_a_row_for_every_kernel() -> None:
    rows = {row.name: row for row in describe()}
    assert list(rows) == list(KERNELS) == ["fa3", "fa2", "cuda_flash", "triton", "cpu_flash", "math", "reference"]
    assert rows["cpu_flash"].available
    assert rows["math"].version == torch.__version__
    assert all(row.reason for row in rows.values())
    if not torch.cuda.is_available():
        assert not rows["fa3"].available
        assert rows["fa3"].reason == "no cuda device"


def test_head_counts_are_checked() -> None:
    q, k, v, _ = make(Shape(heads=5, kv_heads=2))
    with pytest.raises(SequenceParallelConfigError, match="5 is not a multiple of 2"):
        attention(q, k, v, AttentionSpec(MaskSpec()))
    with pytest.raises(SequenceParallelConfigError, match=r"q_per_kv=\(2, 2\).*adding up to 5 query heads; it has 2"):
        attention(q, k, v, AttentionSpec(MaskSpec(), q_per_kv=(2, 2)))
    with pytest.raises(SequenceParallelConfigError, match="one count for each of 2 kv heads"):
        attention(q, k, v, AttentionSpec(MaskSpec(), q_per_kv=(2, 2, 1)))


def test_mixed_dtypes_are_refused() -> None:
    q, k, v, _ = make(Shape())
    with pytest.raises(UnsupportedError, match=r"q torch\.float32, k torch\.float32, v torch\.bfloat16"):
        attention(q, k, v.bfloat16(), AttentionSpec(MaskSpec()))
