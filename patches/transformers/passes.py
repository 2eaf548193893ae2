"""What a forward pass of one model hands to the functions that Transformers calls in it."""

from __future__ import annotations

from dataclasses import dataclass

from dsp_plugin.patches.transformers.inputs import Placement
from dsp_plugin.training.randomness import RegionSeed


@dataclass
class ModelPass:
    """One forward pass of a model.

    Attributes:
        placement: how its tokens lie on the ranks.
        seed: None outside training.
    """

    placement: Placement
    seed: RegionSeed | None
