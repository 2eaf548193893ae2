"""The table of kernels, and the choice among them."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

import torch

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.kernels.chunked import Math
from dsp_plugin.kernels.flash_attention import FlashAttention2, FlashAttention3
from dsp_plugin.kernels.kernel import Kernel, VarlenKernel
from dsp_plugin.kernels.reference import Reference
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.kernels.torch_flash import CpuFlash, CudaFlash
from dsp_plugin.kernels.triton_attention import Triton

# In order of preference for "auto", which never picks the reference.
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (FlashAttention3(), FlashAttention2(), CudaFlash(), Triton(), CpuFlash(), Math(), Reference())
}


@dataclass(frozen=True)
class KernelRow:
    """One line of `describe`."""

    name: str
    available: bool
    reason: str
    version: str | None


def describe() -> list[KernelRow]:
    """What each kernel is in this process, in order of preference."""
    rows = []
    for name, kernel in KERNELS.items():
        available, why = kernel.available()
        if available and isinstance(kernel, VarlenKernel) and kernel.varlen():
            why += "; all packed documents in one call"
        rows.append(KernelRow(name, available, why, kernel.version()))
    return rows


def choose(
    spec: AttentionSpec,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    v_head_dim: int | None = None,
) -> Kernel:
    """The kernel that the spec names, or for ``"auto"`` the first in the table that can do the work.

    Raises:
        SequenceParallelConfigError: there is no kernel of that name.
        UnsupportedError: the named kernel is not available here, or does not support such tensors.
    """
    device, kernel = torch.device(device), spec.kernel
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    if kernel == "auto":
        candidates = [name for name in KERNELS if name != "reference"]
    elif kernel in KERNELS:
        candidates = [kernel]
    else:
        near = get_close_matches(kernel, ["auto", *KERNELS], n=1, cutoff=0.5)
        raise SequenceParallelConfigError(
            setting="kernel",
            value=kernel,
            why=f"kernels are auto, {', '.join(KERNELS)}",
            remedy=f"did you mean {near[0]!r}?" if near else "use 'auto'",
        )
    refusals = {name: _refusal(name, device, dtype, head_dim, v_head_dim, spec) for name in candidates}
    for name, refusal in refusals.items():
        if refusal is None:
            return KERNELS[name]
    able = [name for name in KERNELS if _refusal(name, device, dtype, head_dim, v_head_dim, spec) is None]
    raise UnsupportedError(
        setting="kernel",
        value=kernel,
        why="; ".join(f"{name} cannot serve this: {refusal}" for name, refusal in refusals.items())
        + f" (device {device.type}, {dtype}, head dims {head_dim} and {v_head_dim}, dropout {spec.dropout_p})",
        remedy=f"set kernel to 'auto' or one that can: {', '.join(able)}" if able else "use a floating point dtype",
    )


def _refusal(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, v_head_dim: int, spec: AttentionSpec
) -> str | None:
    kernel = KERNELS[name]
    available, reason = kernel.available()
    return kernel.supports(dtype, device, head_dim, v_head_dim, spec) if available else reason
