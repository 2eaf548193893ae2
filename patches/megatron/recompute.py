"""``--sp-recompute keep_attention``: ``--recompute-granularity full`` and ``selective`` without attention.

Megatron's `CheckpointWithoutOutput` is left alone: what it recomputes are norms, activations and up-projections.
"""

from __future__ import annotations

from dsp_plugin.patches.megatron.state import MegatronState
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch
from dsp_plugin.patches.recompute import checkpoint_function


def patches(state: MegatronState) -> tuple[Patch, ...]:
    """One where the user asked for it, else none."""
    if state.settings.recompute != "keep_attention":
        return ()
    return (checkpoint_function("megatron.core.tensor_parallel.random", DISTRIBUTION, SUPPORTED, lambda: True),)
