"""What one rank needs in all, and whether that fits: model states by arithmetic, the rest from a dry run."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dsp_plugin.rehearsal.dryrun import RankRun
from dsp_plugin.rehearsal.model_states import model_states, moving_bytes

OFFLOADS = ("none", "optimizer", "all")
"""What of the model states DeepSpeed keeps in host memory: ``offload_optimizer`` takes the gradients' share, too."""


class Need(NamedTuple):
    """Bytes of one rank.

    Attributes:
        stage: of ZeRO.
        weights, gradients, optimizer: of model states, on the device.
        moving: weights that are gathered, and gradients that are not reduced yet.
        inputs, activations: of the run.
        total: on the device.
        host: in host memory.
    """

    stage: int
    weights: int
    gradients: int
    optimizer: int
    moving: int
    inputs: int
    activations: int
    total: int
    host: int


def need(run: RankRun, dtype: torch.dtype, ranks: int, stage: int, offload: str = "none") -> Need:
    """Of a training step with Adam under ZeRO.

    Args:
        run: a dry run.
        dtype: of the weights.
        ranks: over which ZeRO partitions.
        offload: in `OFFLOADS`; ``optimizer`` from stage 1 on, ``all`` under stage 3.
    """
    states = model_states(run.parameter_count, dtype, ranks, stage)
    weights, gradients, optimizer, _ = states
    host = run.memory.host
    if offload != "none":
        host, optimizer = host + optimizer, 0
        if stage >= 2:
            host, gradients = host + gradients, 0
    if offload == "all":
        host, weights = host + weights, 0
    moving = moving_bytes(run.units, dtype, stage)
    inputs, activations = run.memory.inputs, run.memory.activations
    total = weights + gradients + optimizer + moving + inputs + activations
    return Need(stage, weights, gradients, optimizer, moving, inputs, activations, total, host)
