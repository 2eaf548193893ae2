"""What ZeRO leaves of weights, gradients and optimizer states on a rank: arithmetic, not a run (arXiv 1910.02054)."""

from __future__ import annotations

from typing import NamedTuple

import torch


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
