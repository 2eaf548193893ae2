"""What DeepSpeed's batch sizes mean when several ranks work on one sample.

DeepSpeed computes ``train_batch_size = micro * accumulation * world``. With the section in the config, `world` in that
rule is the number of replicas: world / sp, also divided by the stages of a pipeline and by AutoTP's ranks. So the sizes
keep counting samples; everything that DeepSpeed derives from them (gradient accumulation, the samples of its monitors,
throughput, learning rate schedules) follows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.patches.deepspeed import tensor_parallel

TRAIN = "train_batch_size"
MICRO = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"


def folding(upstream: Callable[[Any], None]) -> Callable[[Any], None]:
    """Replaces ``DeepSpeedConfig._configure_train_batch_size``.

    It runs after the raw values are read and before any is derived, in `deepspeed.initialize` as in `zero.Init`.
    """

    @functools.wraps(upstream)
    def configure_train_batch_size(self: Any) -> None:
        section = SequenceParallelConfig.from_deepspeed(self._param_dict)
        # zero.Init may read a config before the world exists: DeepSpeed then assumes one rank, and reads it again.
        if section is not None and dist.is_initialized():
            tensor_size = tensor_parallel.size_of(self._param_dict)
            # By what a pipeline's grid told DeepSpeed of data-parallel ranks. AutoTP, which is never beside a pipeline,
            # tells it only where ZeRO 3 reads the config again.
            stages = dist.get_world_size() // self.world_size if tensor_size == 1 else 1
            other = {"pipeline_stages": stages, "autotp_size": tensor_size}
            other = {name: size for name, size in other.items() if size > 1}
            self.world_size = section.check_world(dist.get_world_size(), **other)
            refuse_illegal_sizes(
                train=self.train_batch_size,
                micro=self.train_micro_batch_size_per_gpu,
                accumulation=self.gradient_accumulation_steps,
                world_size=dist.get_world_size(),
                size=section.size,
                **other,
            )
            # A rank's gradient is size times its part of a sum whose parts cancel: bf16 loses what is left of them.
            if self.bfloat16_config.enabled and self.communication_data_type is None:
                self.communication_data_type = torch.float32
        upstream(self)

    return configure_train_batch_size


def refuse_illegal_sizes(
    *, train: Any, micro: Any, accumulation: Any, world_size: int, size: int, **other_sizes: int
) -> None:
    """Checks the two or three batch sizes that the user gave (None: not given) against the replicas.

    Raises:
        SequenceParallelConfigError: one is not a positive integer, neither `train` nor `micro` is given, or they do not
        multiply.
    """
    for setting, value in ((TRAIN, train), (MICRO, micro), (ACCUMULATION, accumulation)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise SequenceParallelConfigError(
                setting=setting,
                value=value,
                why="it is not a positive integer",
                remedy="give a number of samples" if setting != ACCUMULATION else "give a number of micro batches",
            )
    if train is None and micro is None:
        raise SequenceParallelConfigError(
            f"neither {TRAIN} nor {MICRO} is set, so the batch size is unknown. Set {MICRO} to the samples that one "
            f"sequence group works on at a time, or {TRAIN} to the samples of one optimizer step."
        )
    if train is None:
        return

    replicas = world_size // (size * prod(other_sizes.values()))
    sizes = " / ".join([f"sequence_parallel.size {size}", *(f"{name} {value}" for name, value in other_sizes.items())])
    where = f"{world_size} ranks / {sizes} = {replicas} replica{'s' if replicas > 1 else ''}"
    parts = [(MICRO, micro), (ACCUMULATION, accumulation)]
    unit = replicas * (micro or 1) * (accumulation or 1)
    factors = " * ".join([*(f"{name} {value}" for name, value in parts if value is not None), f"{replicas} replicas"])
    if micro is not None and accumulation is not None:
        if train != unit:
            raise SequenceParallelConfigError(
                setting=TRAIN,
                value=train,
                why=f"it counts the samples of one optimizer step, which are {factors} = {unit} ({where})",
                remedy=f"set {TRAIN} to {unit}, or leave one of the three out and it follows from the other two",
            )
    elif train % unit:
        near = max(1, round(train / unit)) * unit
        raise SequenceParallelConfigError(
            setting=TRAIN,
            value=train,
            why=f"it is not a multiple of {factors} = {unit} ({where}): {train} mod {unit} = {train % unit}",
            remedy=f"set {TRAIN} to a multiple of {unit}, such as {near}",
        )
