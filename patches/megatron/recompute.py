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
    if memory != "auto":
        check_torch()
    before = functools.partial(_refusing_before, state)
    return (
        found,
        applied(_MODULE, DISTRIBUTION, SUPPORTED, _saved_as_given),
        _schedule_patch("forward_step", functools.partial(_refusing_after, state), ("model", "config")),
        *(_schedule_patch(f"forward_backward_pipelining_{kind}_interleaving", before) for kind in ("with", "without")),
    )


def check_checkpoints(state: MegatronState, config: Any) -> None:
    """That what is asked of checkpoints is asked of those that a layer of this configuration is put into.

    Raises:
        UnsupportedError: they are Transformer Engine's, which the patches do not reach.
    """
    settings = state.settings
    memory = settings.memory_parts()
    asked = [("--sp-recompute", settings.recompute)] * (settings.recompute == "keep_attention")
    if memory != "auto" and memory.offload is not False:
        asked.append(("memory.offload", str(memory.offload)))
    precision = next((name for name in ("fp8", "fp4") if getattr(config, name, None)), None)
    if precision is None or config.recompute_granularity != "full" or not asked:
        return
    setting, value = asked[0]
    raise UnsupportedError(
        setting=setting,
        value=value,
        why=f"under {precision}={getattr(config, precision)!r} Megatron recomputes whole layers by Transformer "
        "Engine's checkpoint, which runs all of them again and keeps its inputs itself",
        remedy=f"drop {setting}, recompute selectively (--recompute-granularity selective), or train in bf16",
    )


def _schedule_patch(function: str, make: Callable[[Any], Any], parameters: tuple[str, ...] = ()) -> Patch:
    return Patch(
        f"megatron: an offload that nothing uses, {function}",
        f"megatron.core.pipeline_parallel.schedules:{function}",
        DISTRIBUTION,
        SUPPORTED,
        make,
        parameters,
    )


def _saved_as_given(args: Sequence[Any]) -> Sequence[Any]:
    """Of ``apply``: with ``--distribute-saved-activations`` a part of the first tensor is saved, made later."""
    _, distribute, *given = args
    return () if distribute else given


def _refusing_after(state: MegatronState, upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``forward_step``: a model that has made no checkpoints has nothing that could wait in host memory."""
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def forward_step(*args: Any, **kwargs: Any) -> Any:
        found = upstream(*args, **kwargs)
        offload = state.offload
        if offload is not None and not offload.auto and not offload.stretches:
            given = signature.bind(*args, **kwargs).arguments
            if given["model"].training:
                _check_recomputed(given["config"])
        return found

    return forward_step


def _refusing_before(state: MegatronState, upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces a schedule of a pipeline, whose stages would wait for one that refuses later."""

    @functools.wraps(upstream)
    def forward_backward(**given: Any) -> Any:
        if state.offload is not None and not state.offload.auto and not given.get("forward_only"):
            from megatron.core.utils import get_model_config

            model = given["model"]
            _check_recomputed(get_model_config(model[0] if isinstance(model, list) else model))
        return upstream(**given)

    return forward_backward


def _check_recomputed(config: Any) -> None:
    if config.recompute_granularity is None:
        raise UnsupportedError(
            setting="memory.offload",
            why="the model recomputes nothing (recompute_granularity is None), so that it makes no checkpoints that "
            "could wait in host memory",
            remedy="add --recompute-granularity full --recompute-method uniform --recompute-num-layers 1, or drop "
            "offload from --sp-memory",
        )
