"""The loss contract: the mean over the tokens of the whole sequence, with gradients that average over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.collectives import all_gather
from dsp_plugin.layout import Layout


def contract(loss_sum: Tensor, count: Tensor | int, axis: Axis) -> Tensor:
    """The global mean loss from each rank's sum.

    Its value is the mean over all tokens of the sequence, to the bit the same on every rank. Its gradient on this rank
    is P times the gradient of ``loss_sum / global count``, so that the mean of parameter gradients over the ranks,
    which every framework takes, is the gradient of the global mean, however unevenly tokens are spread.

    Sends (P-1) * 16 bytes per rank: one sum and one count, in fp64.

    Args:
        loss_sum: scalar, sum of the losses of this rank's unmasked tokens; 0 where it has none. In fp32 or wider: a sum
            over many tokens overflows fp16.
        count: how many unmasked tokens this rank has.
        axis: the ranks that share the sequence.

    Returns:
        Scalar, in the dtype of ``loss_sum``. NaN if no rank has an unmasked token, as an unsharded mean would be.
    """
    mine = torch.stack([loss_sum.detach().double(), torch.as_tensor(count, device=loss_sum.device).double()])
    layout = Layout.of_sizes([1] * axis.size)
    total_sum, total_count = all_gather(mine.unsqueeze(0), 0, layout, axis=axis, method="loss").sum(0)
    return _GlobalMean.apply(loss_sum, total_sum / total_count, axis.size / total_count)


class _GlobalMean(torch.autograd.Function):
    """The value is one thing, the gradient another: ``factor`` times that of this rank's sum."""

    @staticmethod
    def forward(ctx: Any, loss_sum: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return mean.to(loss_sum.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return (grad * factor).to(grad.dtype), None, None
