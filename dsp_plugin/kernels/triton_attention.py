"""The `triton` kernel: our own flash attention with dropout, one launch forward and two backward for a block."""

from __future__ import annotations

import torch
from torch import Tensor

from dsp_plugin.kernels import triton_ops, triton_usable
from dsp_plugin.kernels.kernel import BlockSpec, Kernel
from dsp_plugin.kernels.spec import AttentionSpec

MAX_HEAD_DIM = 256
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Triton(Kernel):
    """Flash attention for CUDA whose dropout does not depend on the sharding; what ``auto`` takes where there is any.

    fp32 inputs are multiplied in fp32, not in TF32. Gradients are the same on every run.
    """

    name = "triton"
    dropout_cost = "3 launches a block"

    def available(self) -> tuple[bool, str]:
        why = triton_usable.unusable()
        return why is None, why or f"triton is installed; the kernel for dropout on cuda, {self.dropout_cost}"

    def version(self) -> str | None:
        return triton_usable.version() if triton_usable.unusable() is None else None

    def supports(
        self, dtype: torch.dtype, device: torch.device, head_dim: int, v_head_dim: int, spec: AttentionSpec
    ) -> str | None:
        if dtype not in _DTYPES:
            return f"it computes in bfloat16, float16 or float32, the tensors are {dtype}"
        if max(head_dim, v_head_dim) > MAX_HEAD_DIM:
            return f"head dim {max(head_dim, v_head_dim)} exceeds {MAX_HEAD_DIM}"
        if spec.kernel == "auto" and not spec.dropout_p:
            return "auto takes it for dropout only"
        if device.type == "cpu" and triton_usable.interpreted() and spec.kernel == self.name:
            return None
        return triton_usable.refused(device)

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
