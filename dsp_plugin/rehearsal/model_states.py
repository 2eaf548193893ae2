"""What ZeRO leaves of weights, gradients and optimizer states on a rank: arithmetic, not a run (arXiv 1910.02054)."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import nn


class ModelStates(NamedTuple):
    """Bytes on one rank.

    Attributes:
        weights: in the dtype that the model computes in.
        gradients: in the same.
        optimizer: Adam's two moments in fp32, and fp32 weights where the model's are narrower.
        total: all three.
    """

    weights: int
    gradients: int
    optimizer: int
    total: int


def model_states(parameters: int, dtype: torch.dtype, ranks: int, stage: int) -> ModelStates:
    """Model states of ``parameters`` parameters under ZeRO ``stage``, 0 to 3, over ``ranks`` ranks.

    Args:
        ranks: over which ZeRO partitions: data-parallel and sequence ranks together.
    """
    assert 0 <= stage <= 3
    width, moments = dtype.itemsize, 8 + (4 if dtype.itemsize < 4 else 0)

    def share(nbytes: int, since: int) -> int:
        # The busiest rank rounds up.
        return nbytes * -(-parameters // (ranks if stage >= since else 1))

    weights, gradients, optimizer = share(width, 3), share(width, 2), share(moments, 1)
    return ModelStates(weights, gradients, optimizer, weights + gradients + optimizer)


def units_of(module: nn.Module) -> tuple[int, ...]:
    """Elements of what is gathered at a time where weights are partitioned, the largest first.

    A layer of a list is one unit, whatever is in it; outside of lists each module with parameters of its own is one.
    """
    units: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        layer = re.match(r"(.*?\.|)\d+(?=\.)", name)
        unit = name.rpartition(".")[0] if layer is None else layer[0]
        units[unit] = units.get(unit, 0) + parameter.numel()
    return tuple(sorted(units.values(), reverse=True))


def moving_bytes(units: tuple[int, ...], dtype: torch.dtype, stage: int) -> int:
    """What is whole for a moment where ZeRO partitions it.

    Under stage 3 the weights of the largest unit and of one gathered ahead of it, from stage 2 on the gradient of the
    largest unit. DeepSpeed's buckets may hold more: ``reduce_bucket_size`` and ``stage3_prefetch_bucket_size`` say so.

    Args:
        units: of `units_of`.
    """
    gathered = sum(units[:2]) if stage == 3 else 0
    unreduced = sum(units[:1]) if stage >= 2 else 0
    return (gathered + unreduced) * dtype.itemsize
