"""The mean loss of a microbatch whose unmasked tokens are spread unevenly over the context-parallel ranks.

Megatron divides a rank's summed loss by that rank's own token count and averages over ranks, which is the mean over the
tokens only where all ranks have equally many. ``--calculate-per-token-loss`` avoids that, and is left alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.collectives import all_gather
from dsp_plugin.layout import Layout
from dsp_plugin.patches.megatron.state import MegatronState
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch


def patches(state: MegatronState) -> tuple[Patch, ...]:
    """Wraps what every pipeline schedule calls to take the loss."""
    return (
        Patch(
            "megatron mean loss over uneven token counts",
            "megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",
            DISTRIBUTION,
            SUPPORTED,
            functools.partial(_weighing, state),
            ("loss_func", "config", "collect_non_loss_data"),
        ),
    )


def _weighing(state: MegatronState, upstream: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def forward_step_calc_loss(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        sharded = state.groups is not None and state.groups.sp.size > 1
        averaged = not given["config"].calculate_per_token_loss and not given["collect_non_loss_data"]
        if sharded and averaged and given["loss_func"] is not None:
            given["loss_func"] = _weighed(given["loss_func"], state.groups.sp)
        return upstream(*call.args, **call.kwargs)

    return forward_step_calc_loss


def _weighed(loss_func: Callable[..., Any], sp: Axis) -> Callable[..., Any]:
    """A loss function of three outputs whose sum, over its own token count, averages to the mean over all tokens.

    Sends 8 (P-1) bytes a rank: a count in fp64. A function of two outputs has taken its mean itself.
    """

    def weighed(*args: Any) -> Any:
        outputs = loss_func(*args)
        if len(outputs) != 3:
            return outputs
        loss_sum, count, report = outputs
        counts = all_gather(_count(count), 0, Layout.of_sizes([1] * sp.size), axis=sp, method="loss")
        # Both as upstream has it: where no token counts, the loss is 0 and not undefined.
        factor = sp.size * counts[sp.rank].clamp(min=1) / counts.sum().clamp(min=1)
        return (loss_sum * factor).to(loss_sum.dtype), count, report

    return weighed


def _count(count: Tensor) -> Tensor:
    return count.detach().reshape(1).to(torch.float64)
