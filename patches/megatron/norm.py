"""Norms under ``--sequence-parallel`` where neither Apex nor Transformer Engine is installed.

Megatron's fallback to torch's LayerNorm and RMSNorm refuses tensor-sequence parallelism. All it lacks is the mark on
its parameters that makes `finalize_model_grads` add up their gradients over the tensor-parallel ranks, each of which
saw part of the tokens.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch


def patches() -> tuple[Patch, ...]:
    """Wraps the fallback's constructor."""
    return (
        Patch(
            "megatron torch norm with sequence_parallel",
            "megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
            DISTRIBUTION,
            SUPPORTED,
            _mark_parameters,
            ("config", "hidden_size", "eps"),
        ),
    )


def _mark_parameters(upstream: staticmethod[Any, Any]) -> staticmethod[Any, Any]:
    signature = inspect.signature(upstream.__func__)

    @functools.wraps(upstream.__func__)
    def __new__(*args: Any, **kwargs: Any) -> Any:  # noqa: N807
        call = signature.bind(*args, **kwargs)
        config = call.arguments["config"]
        if not config.sequence_parallel:
            return upstream.__func__(*args, **kwargs)
        call.arguments["config"] = copy.copy(config)
        call.arguments["config"].sequence_parallel = False
        norm = upstream.__func__(*call.args, **call.kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return staticmethod(__new__)
