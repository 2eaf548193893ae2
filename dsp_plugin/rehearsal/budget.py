"""What one rank needs in all, and whether that fits: model states by arithmetic, the rest from a dry run."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsp_plugin.rehearsal.dryrun import RankRun
from dsp_plugin.rehearsal.model_states import model_states, moving_bytes
from dsp_plugin.rehearsal.subject import Library
from dsp_plugin.rehearsal.timeline import BACKWARD

OFFLOADS = ("none", "optimizer", "all")
"""What of the model states DeepSpeed keeps in host memory: ``offload_optimizer`` takes the gradients' share, too."""


class Need(NamedTuple):
    """Bytes of one rank.

    Attributes:
        states: how model states are sharded.
        weights, gradients, optimizer: of model states, on the device.
        moving: weights that are gathered, and gradients that are not where they belong yet.
        inputs, activations: of the run; activations of all microbatches that are in flight at once.
        total: on the device.
        host: in host memory.
    """

    states: str
    weights: int
    gradients: int
    optimizer: int
    moving: int
    inputs: int
    activations: int
    total: int
    host: int


def needs(run: RankRun, dtype: torch.dtype, ranks: int, offload: str = "none") -> list[Need]:
    """Of a training step with Adam: under every stage of ZeRO, or as the library has it that sharded the model.

    Args:
        run: a dry run.
        dtype: of the weights.
        ranks: over which ZeRO partitions.
        offload: in `OFFLOADS`; where a stage does not have it, states stay on the device.
    """
    if run.library is not None:
        return [_of_library(run, run.library, dtype)]
    return [_of_stage(run, dtype, ranks, stage, offload) for stage in range(4)]


def _of_stage(run: RankRun, dtype: torch.dtype, ranks: int, stage: int, offload: str) -> Need:
    weights, gradients, optimizer, _ = model_states(run.parameter_count, dtype, ranks, stage)
    host = 0
    if (offload == "optimizer" and stage > 0) or (offload == "all" and stage == 3):
        host, optimizer = host + optimizer, 0
        if stage > 1:
            host, gradients = host + gradients, 0
        if offload == "all":
            host, weights = host + weights, 0
    return _with_run(run, f"ZeRO {stage}", weights, gradients, optimizer, moving_bytes(run.units, dtype, stage), host)


def _of_library(run: RankRun, library: Library, dtype: torch.dtype) -> Need:
    count = run.parameter_count
    stage = 1 if library.partitioned else 0
    weights, gradients, optimizer, _ = model_states(count, dtype, library.replicas, stage)
    moving = 0
    if library.wide_gradients and dtype.itemsize < 4:
        # Kept in fp32; a weight's own is there until it has been added.
        gradients, moving = 4 * count, max(run.units, default=0) * dtype.itemsize
    name = "distributed optimizer" if library.partitioned else "optimizer on every rank"
    return _with_run(run, name, weights, gradients, optimizer, moving, 0)


def _with_run(run: RankRun, name: str, weights: int, gradients: int, optimizer: int, moving: int, host: int) -> Need:
    inputs, activations, waiting = run.memory.inputs, run.memory.activations, run.memory.host
    more = 0 if run.library is None else run.library.in_flight - 1
    if more:
        assert run.timeline is not None
        activations += more * run.timeline.alive_before(BACKWARD, run.gradients)
        inputs, waiting = inputs * (1 + more), waiting * (1 + more)
    total = weights + gradients + optimizer + moving + inputs + activations
    return Need(name, weights, gradients, optimizer, moving, inputs, activations, total, host + waiting)
