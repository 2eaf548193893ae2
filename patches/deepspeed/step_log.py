"""The step log of an engine: a line every ``log_every`` optimizer steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.methods import METHODS
from dsp_plugin.training import log_writers
from dsp_plugin.training.step_log import StepLog, known_peak

LOG = "sequence_parallel_log"
_LOSSES = "_sequence_parallel_losses"


def writers_of(config: SequenceParallelConfig) -> list[log_writers.Writer]:
    """What the section asks for; made on every rank, so that a missing package is the same error on all.

    Raises:
        SequenceParallelConfigError: a package is not installed.
    """
    return log_writers.writers(config.log_tensorboard, config.log_wandb) if config.log_every else []


def start(
    engine: Any, config: SequenceParallelConfig, groups: SequenceParallelGroups, writers: list[log_writers.Writer]
) -> Callable[[], None]:
    """Begins the log of an engine that is built.

    Returns:
        What ends it.
    """
    parameters = list(engine.module.parameters())
    log = StepLog(
        every=config.log_every,
        parameters=sum(_size(parameter) for parameter in parameters),
        sequence_size=groups.sp.size,
        replicas=groups.dp.size,
        methods=[*METHODS, "loss"],
        peak_tflops=config.peak_tflops or known_peak(parameters[0].dtype if parameters else torch.float32),
        writers=writers,
    )
    setattr(engine, LOG, log)
    setattr(engine, _LOSSES, [])

    def end() -> None:
        vars(engine).pop(LOG, None)
        log.close()

    return end


def collecting(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``DeepSpeedEngine.backward``: keeps the losses of a step."""

    @functools.wraps(upstream)
    def backward(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = args[0] if args else kwargs.get("loss")
        if LOG in vars(self) and isinstance(loss, Tensor):
            vars(self)[_LOSSES].append(loss.detach().clone())
        return upstream(self, *args, **kwargs)

    return backward


def stepping(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``DeepSpeedEngine.step``: ends the step of the log with the optimizer's."""

    @functools.wraps(upstream)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        log: StepLog | None = vars(self).get(LOG)
        boundary = log is not None and self.is_gradient_accumulation_boundary()
        done = upstream(self, *args, **kwargs)
        if log is not None and boundary:
            losses = vars(self)[_LOSSES]
            log.step(self.global_steps, torch.stack(losses).mean() if losses else None)
            losses.clear()
        return done

    return step


def _size(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, of which ZeRO 3 leaves a rank a part."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
