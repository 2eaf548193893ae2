"""First weights of a `VisionTransformer`; in and out of `ParallelVisionTransformer` they go by video_dit_weights.py."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_DEVIATIONS = {
    "trunk.embed.variables.bias": 0.5,
    "trunk.locate.front": 0.5,
    "trunk.readout.weight": 0.02,
}


def draw(name: str, shape: Iterable[int], seed: int) -> Tensor:
    """A first value of a parameter, from a generator of its own name: the same at any parallel sizes.

    Distributions are those of `dsp_plugin.models.vit.initialise`.

    Returns:
        fp32, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    value = torch.empty(tuple(shape))
    if "norm" in name:
        return value.fill_(1.0 if name.endswith("weight") else 0.0)
    if name == "trunk.embed.variables.weight":
        return value.normal_(0.0, value.shape[1] ** -0.5, generator=generator)
    if name in _DEVIATIONS:
        return value.normal_(0.0, _DEVIATIONS[name], generator=generator)
    if name.endswith("bias"):
        return value.normal_(0.0, 0.01, generator=generator)
    return nn.init.xavier_uniform_(value, generator=generator)
