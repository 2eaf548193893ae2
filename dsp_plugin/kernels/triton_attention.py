"""The `triton` kernel: our own flash attention with dropout, one launch forward and two backward for a block."""

from __future__ import annotations

import importlib
import os
from functools import lru_cache

import torch
from torch import Tensor

from dsp_plugin.kernels import triton_ops
from dsp_plugin.kernels.kernel import BlockSpec, Kernel
from dsp_plugin.kernels.spec import AttentionSpec

MAX_HEAD_DIM = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MIN_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, which it does on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# Asked at every call. Importing Triton takes a second, and is of no use without a device.
@lru_cache(maxsize=1)
def _version() -> str | None:
    try:
        version = importlib.import_module("triton").__version__
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None
    return str(version)


def unusable() -> str | None:
    """Why Triton kernels cannot run in this process; None if they can."""
    if not interpreted():
        if not torch.cuda.is_available():
            return "no cuda device"
        if torch.version.hip is not None:
            return "its tiles are sized for the shared memory of NVIDIA's GPUs"
    return None if _version() is not None else "package triton is not installed, or cannot be imported"


class Triton(Kernel):
    """Flash attention for CUDA whose dropout does not depend on the sharding; what ``auto`` takes where there is any.

    fp32 inputs are multiplied in fp32, not in TF32. Gradients are the same on every run.
    """

    name = "triton"

    def available(self) -> tuple[bool, str]:
        why = unusable()
        return why is None, why or "triton is installed; the kernel for dropout on cuda"

    def version(self) -> str | None:
        return _version() if unusable() is None else None

    def supports(
        self, dtype: torch.dtype, device: torch.device, head_dim: int, v_head_dim: int, spec: AttentionSpec
    ) -> str | None:
        if device.type != "cuda" and not (device.type == "cpu" and interpreted() and spec.kernel == self.name):
            return f"it runs on cuda devices, the tensors are on {device.type}"
        if dtype not in _DTYPES:
            return f"it computes in bfloat16, float16 or float32, the tensors are {dtype}"
        if max(head_dim, v_head_dim) > MAX_HEAD_DIM:
            return f"head dim {max(head_dim, v_head_dim)} exceeds {MAX_HEAD_DIM}"
        if spec.kernel == "auto" and not spec.dropout_p:
            return "auto takes it for dropout only"
        if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < _MIN_CAPABILITY:
            return f"it needs compute capability {_MIN_CAPABILITY}, the device has {capability}"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> tuple[Tensor, Tensor]:
        out, lse = torch.ops.dsp_plugin.triton_attention_forward.default(q, k, v, *triton_ops.told(block))
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        block: BlockSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        operator = torch.ops.dsp_plugin.triton_attention_backward.default
        dq, dk, dv = operator(dout, q, k, v, out, lse, *triton_ops.told(block))
        return dq, dk, dv
