"""NEFTune (arXiv 2310.05914): noise on the embeddings, scaled by the length of the sequence, not of a shard."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from dsp_plugin.layout import Layout

ALPHA = "neftune_noise_alpha"


def scale_noise(model: Any, layout: Layout, rank: int) -> Callable[[], None]:
    """Has the noise of one forward pass scaled as it would be unsharded; returns what undoes it.

    The hook divides alpha by the root of the count of entries that it is given, n * D of L * D; no rank is without.
    """
    embeddings = model.get_input_embeddings()
    alpha = getattr(embeddings, ALPHA, None)
    if alpha is None or not model.training:
        return lambda: None
    setattr(embeddings, ALPHA, alpha * math.sqrt(layout.sizes[rank] / layout.length))
    return lambda: setattr(embeddings, ALPHA, alpha)
