"""What a local attention kernel must offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dsp_plugin.adjacent import adjacent
from dsp_plugin.kernels.dropout import Dropout
from dsp_plugin.kernels.merge import accumulation_dtype
from dsp_plugin.kernels.segments import Segments
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.mask import Band


@dataclass(frozen=True)
class BlockSpec:
    """What a kernel computes over one block: everything about it but its tensors.

    Attributes:
        band: which keys a query of the block sees, in the block's own coordinates.
        scale: factor on the scores.
        dropout: of this block; None without.
    """

    band: Band
    scale: float
    dropout: Dropout | None = None


class Kernel(ABC):
    """Attention over one trimmed block (see `dsp_plugin.kernels.blocks`), forward and backward.

    Shapes: q ``[B, n, H, D]``, k ``[B, m, K, D]``, v ``[B, m, K, Dv]``, K divides H and query head h reads kv head
    ``h // (H / K)``; out ``[B, n, H, Dv]``; lse ``[B, H, n]``, fp32 (fp64 for fp64 inputs), the natural logarithm of
    the sum of exponentials of the scaled scores. No dimension is empty.
    """

    name: ClassVar[str]
    dropout_cost: ClassVar[str] = ""
    """What a GPU pays for attention with dropout, forward and backward; of kernels that have it."""

    @abstractmethod
    def available(self) -> tuple[bool, str]:
        """Whether this process can use the kernel at all, and why (not)."""

    @abstractmethod
    def version(self) -> str | None:
        """Version of the package the kernel comes from, None if that is not installed."""

    @abstractmethod
    def supports(
        self, dtype: torch.dtype, device: torch.device, head_dim: int, v_head_dim: int, spec: AttentionSpec
    ) -> str | None:
        """None if the kernel, where available, can serve this attention on such tensors; else the reason why not."""

    def lse_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the lse for inputs of ``dtype``."""
        return accumulation_dtype(dtype)

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of out and of gradients for inputs of ``dtype``: a wider one where the kernel has it anyway."""
        return dtype

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> tuple[Tensor, Tensor]:
        """Returns ``(out, lse)``; out in `result_dtype`."""

    @abstractmethod
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
        """Returns ``(dq, dk, dv)`` in `result_dtype`.

        ``out`` and ``lse`` may belong to attention over more keys than this block's: the result is then this block's
        share of the gradients, which is what ring attention sums over blocks.
        """


class VarlenKernel(Kernel):
    """A kernel that does any number of segments in one call, with the shapes of a block's; without dropout."""

    def varlen(self) -> bool:
        """Whether the version at hand does."""
        return True

    @abstractmethod
    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Returns ``(out, lse)``, as `Kernel.forward` does."""

    @abstractmethod
    def varlen_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: Segments,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ``(dq, dk, dv)``, as `Kernel.backward` does."""


def padded(x: Tensor, head_dim: int) -> Tensor:
    """x with its head dim zero-padded to ``head_dim``, dense in that dim.

    Zeros change neither the scores nor the other output columns. Flash kernels read the head dim as if it had stride
    1 and never check it.
    """
    if x.shape[-1] < head_dim:
        return torch.nn.functional.pad(x, (0, head_dim - x.shape[-1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def laid_alike(*tensors: Tensor) -> list[Tensor]:
    """An empty tensor for each ``[..., heads, D]``, which lie to each other as these do where these are adjacent.

    Gradients then go back the way that the tensors came without being brought together first.
    """
    lead = tensors[0].dim() - 2
    order = sorted(range(lead), key=tensors[0].stride, reverse=True)
    whole = adjacent([x.permute(*order, lead, lead + 1) for x in tensors], lead)
    if whole is None:
        return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in tensors]
    buffer = torch.empty(whole.numel(), dtype=whole.dtype, device=whole.device)
    return [buffer.as_strided(x.shape, x.stride(), x.storage_offset() - whole.storage_offset()) for x in tensors]
