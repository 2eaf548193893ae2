"""Multi-token prediction where context parallelism would weigh its loss by a rank's own count of tokens: refused.

From core 0.17 on (`megatron.core.transformer.multi_token_prediction.process_mtp_loss`) upstream divides by the tokens
that are left on this rank when labels have been shifted; before, it does so without ``--calculate-per-token-loss``
(`GPTModel._postprocess`). Ranks have unequally many, so neither its loss nor its gradients are those of one process.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from packaging.version import Version

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch

EXACT_BEFORE = Version("0.17")
_MODULE = "megatron.core.transformer.multi_token_prediction"


def patches() -> tuple[Patch, ...]:
    """Wraps the construction of the layers that predict further tokens."""
    try:
        importlib.import_module(_MODULE)
    except ImportError:
        # Then no model can have them.
        return ()
    patch: Patch = Patch(
        "refuse multi-token prediction",
        f"{_MODULE}:MultiTokenPredictionBlock.__init__",
        DISTRIBUTION,
        SUPPORTED,
        lambda upstream: _refusing(upstream, patch),
        ("config",),
    )
    return (patch,)


def _refusing(upstream: Callable[..., None], patch: Patch) -> Callable[..., None]:
    @functools.wraps(upstream)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        core = Version(patch.version or "0")
        if config.context_parallel_size > 1 and (core >= EXACT_BEFORE or not config.calculate_per_token_loss):
            whose = f"megatron-core {core}"
            if core < EXACT_BEFORE:
                whose += " without --calculate-per-token-loss"
            raise UnsupportedError(
                setting="--mtp-num-layers",
                value=config.mtp_num_layers,
                why=f"with --context-parallel-size {config.context_parallel_size}, {whose} divides the loss of "
                "multi-token prediction by each rank's own count of tokens, so losses and gradients are not those of "
                "one process",
                remedy="leave --mtp-num-layers out"
                + (", or add --calculate-per-token-loss" if core < EXACT_BEFORE else ""),
            )
        upstream(self, config, *args, **kwargs)

    return __init__
