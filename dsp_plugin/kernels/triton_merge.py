"""`dsp_plugin.kernels.merge.merge_` in one launch: a torch operator, whose kernel is in `triton_merge_kernel`."""

from __future__ import annotations

import torch
from torch import Tensor

from dsp_plugin.kernels import triton_usable

_NAME = "dsp_plugin::triton_merge_"

torch.library.define(_NAME, "(Tensor(a!) out, Tensor(b!) lse, Tensor block_out, Tensor block_lse) -> ()")


@torch.library.register_fake(_NAME)
def _fake(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    return None


@torch.library.impl(_NAME, ("cuda", "cpu"))
def _merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    from dsp_plugin.kernels.triton_merge_kernel import merge_

    merge_(out, lse, block_out if block_out.stride(-1) == 1 else block_out.contiguous(), block_lse)


def serves(out: Tensor, lse: Tensor) -> bool:
    """Whether the operator can merge into these."""
    return bool(
        out.is_cuda
        and out.dtype == lse.dtype == torch.float32
        and out.stride(-1) == 1
        and triton_usable.unusable() is None
        and triton_usable.refused(out.device) is None
    )


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """See `dsp_plugin.kernels.merge.merge_`; of any rows, empty ones too."""
    torch.ops.dsp_plugin.triton_merge_.default(out, lse, block_out, block_lse)
