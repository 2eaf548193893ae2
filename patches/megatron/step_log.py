"""The step log on Megatron-core: a line every ``--sp-log-every`` global batches that a schedule has trained on.

A step is counted from the end of one global batch to the end of the next, so the optimizer's part is in it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm import meter
from dsp_plugin.methods import METHODS
from dsp_plugin.patches.megatron.state import MegatronState
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch
from dsp_plugin.training import log_writers
from dsp_plugin.training.step_log import StepLog, known_peak

_HOME = "megatron.core.pipeline_parallel"


def patches(state: MegatronState) -> tuple[Patch, ...]:
    """Where the user asked for it: the function that hands out schedules, in both places that it is imported from."""
    if not state.settings.log_every:
        return ()
    counted = _Counted(state)
    return tuple(
        Patch(
            f"megatron step log: {module}",
            f"{module}:get_forward_backward_func",
            DISTRIBUTION,
            SUPPORTED,
            counted.schedules,
        )
        for module in (f"{_HOME}.schedules", _HOME)
    )


class _Counted:
    """The schedules of a run, and its log from the first global batch on."""

    def __init__(self, state: MegatronState) -> None:
        self._state, self._steps = state, 0
        self._log: StepLog | None = None
        self._writers: list[log_writers.Writer] = []

    def schedules(self, upstream: Callable[..., Any]) -> Callable[..., Any]:
        """Replaces ``get_forward_backward_func``.

        Raises:
            SequenceParallelConfigError: TensorBoard or wandb is asked for and not installed.
        """
        settings = self._state.settings
        if not self._writers:
            self._writers = log_writers.writers(settings.log_tensorboard, settings.log_wandb)

        @functools.wraps(upstream)
        def get_forward_backward_func(*args: Any, **kwargs: Any) -> Any:
            return self._schedule(upstream(*args, **kwargs))

        return get_forward_backward_func

    def _schedule(self, upstream: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(upstream)

        @functools.wraps(upstream)
        def forward_backward(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            if given.get("forward_only"):
                resume = self._log.pause() if self._log is not None else None
                found = upstream(*args, **kwargs)
                if resume is not None:
                    resume()
                return found
            log = self._started(given["model"])
            # A video's schedule is given the rows that cross a border; its model counts the tokens.
            if self._state.settings.method != "dsp":
                sizes = ("seq_length", "micro_batch_size", "num_microbatches")
                meter.count(tokens=given[sizes[0]] * given[sizes[1]] * given[sizes[2]])
            found = upstream(*args, **kwargs)
            self._steps += 1
            loss, weight = _loss(found)
            log.step(self._steps, loss, weight)
            return found

        return forward_backward

    def _started(self, model: Any) -> StepLog:
        from megatron.core import parallel_state

        if self._log is None:
            chunks = model if isinstance(model, Sequence) else [model]
            parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
            settings = self._state.settings
            assert self._state.groups is not None
            self._log = StepLog(
                every=settings.log_every,
                parameters=sum(parameter.numel() for parameter in parameters),
                sequence_size=self._state.groups.sp.size,
                replicas=parallel_state.get_data_parallel_world_size(),
                methods=[*METHODS, "loss"],
                peak_tflops=settings.peak_tflops or known_peak(parameters[0].dtype),
                writers=self._writers,
            )
        return self._log


def _loss(reports: Any) -> tuple[Tensor | None, Tensor | float]:
    """The mean loss of a global batch and its weight, of what a script's loss function reports by microbatch.

    Known is Megatron's own form: a sum and a count, under a name or alone. The last pipeline stage alone has reports.
    """
    found = [next(iter(report.values()), None) if isinstance(report, dict) else report for report in reports or ()]
    sums = [value.detach().double().reshape(-1) for value in found if isinstance(value, Tensor) and value.numel() == 2]
    if not sums:
        return None, 1.0
    total, count = torch.stack(sums).sum(0)
    return total / count.clamp(min=1), count
