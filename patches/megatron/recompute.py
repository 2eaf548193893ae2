"""What Megatron recomputes: without attention under ``--sp-recompute keep_attention``, and from host memory.

``--recompute-granularity full`` and ``selective``, as far as it goes by ``tensor_parallel.checkpoint``. Megatron's
`CheckpointWithoutOutput` is left alone: what it recomputes are norms, activations and up-projections.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches.megatron.state import MegatronState
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.offload import applied, check_torch
from dsp_plugin.patches.patch import Patch
from dsp_plugin.patches.recompute import checkpoint_function

_MODULE = "megatron.core.tensor_parallel.random"


def patches(state: MegatronState) -> tuple[Patch, ...]:
    """Those that the user asked for.

    Raises:
        PatchError: checkpoints are to wait in host memory, and torch does not tell what they are kept by.
    """
    keep, memory = state.settings.recompute == "keep_attention", state.settings.memory_parts()
    offload = memory == "auto" or memory.offload is not False
    if not keep and not offload:
        return ()
    found = checkpoint_function(_MODULE, DISTRIBUTION, SUPPORTED, lambda: keep)
    if not offload:
        return (found,)
    check_torch()
    return (
        found,
        applied(_MODULE, DISTRIBUTION, SUPPORTED, _saved_as_given),
        Patch(
            "megatron: an offload that nothing uses",
            "megatron.core.pipeline_parallel.schedules:forward_step",
            DISTRIBUTION,
            SUPPORTED,
            functools.partial(_refusing, state),
            ("model", "config"),
        ),
    )


def _saved_as_given(args: Sequence[Any]) -> Sequence[Any]:
    """Of ``apply``: with ``--distribute-saved-activations`` a part of the first tensor is saved, made later."""
    _, distribute, *given = args
    return () if distribute else given


def _refusing(state: MegatronState, upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``forward_step``: a model that recomputes nothing keeps nothing that could wait in host memory."""
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def forward_step(*args: Any, **kwargs: Any) -> Any:
        found = upstream(*args, **kwargs)
        offload = state.offload
        if offload is None or offload.auto or offload.stretches:
            return found
        given = signature.bind(*args, **kwargs).arguments
        if given["model"].training and given["config"].recompute_granularity is None:
            raise UnsupportedError(
                setting="memory.offload",
                why="the model recomputes nothing (recompute_granularity is None), so that it makes no checkpoints "
                "that could wait in host memory",
                remedy="add --recompute-granularity full --recompute-method uniform --recompute-num-layers 1, or drop "
                "offload from --sp-memory",
            )
        return found

    return forward_step
