"""What a forward pass of one model hands to the functions that Transformers calls in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsp_plugin.mask import MaskSpec
from dsp_plugin.patches.transformers.inputs import Placement
from dsp_plugin.training.randomness import RegionSeed

Band = tuple[bool, int | None]


@dataclass
class ModelPass:
    """One forward pass of a model.

    Attributes:
        placement: how its tokens lie on the ranks.
        seed: None outside training.
        masks: those of its layers, as methods take them, by band: thousands of borders are looked at once a pass.
    """

    placement: Placement
    seed: RegionSeed | None
    masks: dict[Band, MaskSpec] = field(default_factory=dict)

    def mask(self, causal: bool, window: int | None) -> MaskSpec:
        """In the documents of the rows, where all share them.

        Args:
            window: as of `SequenceMask`.
        """
        if (causal, window) not in self.masks:
            sides = None if window is None else (window - 1, 0) if causal else (window, window)
            self.masks[causal, window] = MaskSpec(causal, sides, self.placement.rows.documents)
        return self.masks[causal, window]
