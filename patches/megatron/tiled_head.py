"""The head and its loss tile by tile: no rank holds the logits of all its tokens, on its part of the vocabulary.

`GPTModel` and the hybrid models call their output layer, scale its logits and take the loss of them; multi-token
prediction does so again for each further token. Inside a forward pass that has labels the output layer returns
`DeferredLogits`, of which `LanguageModule.compute_language_model_loss` then takes the loss. The layer is called as
ever, so hooks on it run, and its weight's gradient comes out of one autograd function once, also where it is tied.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches.megatron.deferred_logits import DeferredLogits, tile_of
from dsp_plugin.patches.megatron.state import MegatronState, Memory
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch

_LANGUAGE = "megatron.core.models.common.language_module.language_module"
_GPT = "megatron.core.models.gpt.gpt_model"
_MULTI_TOKEN = "megatron.core.transformer.multi_token_prediction"
_REMEDY = "leave tile_tokens out of the section that --sp-memory is given"


def patches(state: MegatronState) -> tuple[Patch, ...]:
    """Of the models that are known, their head; none where the head is not to be tiled."""
    memory = state.settings.memory_parts()
    if memory != "auto" and memory.tile_tokens is None:
        return ()
    found = [
        _patch(f"{_LANGUAGE}:LanguageModule.__init__", _refuse_unknown, ("self", "config")),
        _patch(f"{_LANGUAGE}:LanguageModule.compute_language_model_loss", _loss, ("self", "labels", "logits")),
    ]
    for module, name, forward in _models():
        found.append(_patch(f"{module}:{name}.__init__", _refuse_gathered, ("self",)))
        deferring = functools.partial(_deferring, state, memory)
        found.append(_patch(f"{module}:{name}.{forward}", deferring, ("labels",)))
    if hasattr(importlib.import_module(_MULTI_TOKEN), "_compute_mtp_acceptance_counts"):
        counts = f"{_MULTI_TOKEN}:_compute_mtp_acceptance_counts"
        found.append(_patch(counts, _acceptance, ("mtp_logits", "mtp_labels", "loss_mask")))
    return tuple(found)


def _models() -> Iterator[tuple[str, str, str]]:
    """Module, class, and the method that makes logits and takes their loss."""
    yield _GPT, "GPTModel", "_postprocess"
    try:
        importlib.import_module("megatron.core.models.hybrid.hybrid_model")
        yield "megatron.core.models.hybrid.hybrid_model", "HybridModel", "forward"
    except ImportError:
        # Before core 0.18 there is one class of hybrids, under its old name.
        yield "megatron.core.models.mamba.mamba_model", "MambaModel", "forward"


def _patch(target: str, make: Callable[[Any], object], parameters: tuple[str, ...]) -> Patch:
    return Patch(f"megatron tiled head: {target}", target, DISTRIBUTION, SUPPORTED, make, parameters)


def _refuse_unknown(upstream: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(upstream)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        known = tuple(getattr(importlib.import_module(module), name) for module, name, _ in _models())
        if not isinstance(self, known):
            raise UnsupportedError(
                setting="model",
                value=type(self).__name__,
                why="how it makes logits and takes their loss is not known; tiles serve "
                + " and ".join(model.__name__ for model in known),
                remedy=_REMEDY,
            )
        home = importlib.import_module(_LANGUAGE).LanguageModule
        for method in ("compute_language_model_loss", "_scale_logits"):
            if getattr(type(self), method, None) is not getattr(home, method, None):
                raise UnsupportedError(
                    setting="model",
                    value=type(self).__name__,
                    why=f"its own {method} takes logits, and tiles have none of all tokens to give to it",
                    remedy=_REMEDY,
                )
        _check_config(config)
        upstream(self, config, *args, **kwargs)

    return __init__


def _check_config(config: Any) -> None:
    for setting, flag, why in (
        (
            "defer_embedding_wgrad_compute",
            "--defer-embedding-wgrad-compute",
            "it keeps the gradients of all logits of many microbatches, which tiles never make",
        ),
        ("config_logger_dir", "--config-logger-dir", "it writes the logits to disk, which tiles never make"),
        ("fp8_output_proj", "--fp8-output-proj", "the output layer multiplies in MXFP8, and tiles do not"),
        (
            "gtp_weight_remat_size",
            "--gtp-weight-remat-size",
            "the weight is whole only within its own layer",
        ),
    ):
        value = getattr(config, setting, None)
        if value not in (None, False, "", 1) or value is True:
            raise UnsupportedError(setting=flag, value=value, why=why, remedy=f"drop it, or {_REMEDY}")


def _refuse_gathered(upstream: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(upstream)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        upstream(self, *args, **kwargs)
        if not self.parallel_output and self.config.tensor_model_parallel_size > 1:
            raise UnsupportedError(
                setting="parallel_output",
                value=False,
                why="every tensor-parallel rank would gather the logits of the whole vocabulary",
                remedy=f"build the model with parallel_output=True, or {_REMEDY}",
            )

    return __init__


def _deferring(state: MegatronState, memory: Memory, upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Around the method of a model that calls its output layer and takes the loss."""
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def with_deferred_logits(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        model = given["self"]
        if given.get("labels") is None or not model.post_process:
            return upstream(*args, **kwargs)
        if given.get("output_processor") is not None:
            raise UnsupportedError(
                setting="output_processor",
                value=getattr(given["output_processor"], "__qualname__", type(given["output_processor"]).__name__),
                why="it takes the output layer, and what it does with its logits is not known",
                remedy=_REMEDY,
            )
        with _deferred(state, memory, model.output_layer):
            return upstream(*args, **kwargs)

    return with_deferred_logits


@contextmanager
def _deferred(state: MegatronState, memory: Memory, layer: Any) -> Iterator[None]:
    """While entered, the output layer returns `DeferredLogits`."""
    layer.forward = functools.partial(_forward, state, memory, layer)
    try:
        yield
    finally:
        del layer.forward


def _forward(
    state: MegatronState,
    memory: Memory,
    layer: Any,
    input_: Tensor,
    weight: Tensor | None = None,
    runtime_gather_output: bool | None = None,
) -> tuple[DeferredLogits, Tensor | None]:
    """In place of `ColumnParallelLinear.forward`: the same collectives of activations and of their gradients."""
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
    )

    weight = layer.weight if weight is None else weight
    assert weight is not None, "the weight was given neither to the output layer nor to its call"
    sharded = getattr(layer, "gtp_remat_size", 1) > 1 or getattr(weight, "__fsdp_param__", False)
    if type(layer) is not ColumnParallelLinear or sharded:
        raise UnsupportedError(
            setting="output layer",
            value=type(layer).__name__,
            why="its weight is whole only within its own forward pass"
            if sharded
            else "what else it does than multiply by its weight is not known",
            remedy=f"use Megatron's distributed data parallel and its ColumnParallelLinear, or {_REMEDY}",
        )
    tp = Axis.of_group("tp", layer.tp_group)
    if runtime_gather_output and tp.size > 1:
        raise UnsupportedError(
            setting="runtime_gather_output",
            value=True,
            why="every tensor-parallel rank would gather the logits of the whole vocabulary, also with labels",
            remedy=f"leave it out where labels are given, or {_REMEDY}",
        )
    if layer.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(input_, group=layer.tp_group)
    else:
        hidden = copy_to_tensor_model_parallel_region(input_, group=layer.tp_group)
    bias, beside = (None, layer.bias) if layer.skip_bias_add else (layer.bias, None)
    tile = tile_of(memory, weight.shape[0])
    assert tile is not None, "patched only where the head is tiled"
    axis = tp.debugged(state.groups is not None and state.groups.sp.debug)
    return DeferredLogits(hidden, weight, bias, axis, tile), beside


def _loss(upstream: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(upstream)
    def compute_language_model_loss(self: Any, labels: Tensor, logits: Any) -> Tensor:
        if not isinstance(logits, DeferredLogits):
            return upstream(self, labels, logits)
        # Labels and losses are [b, s], activations [s, b, h].
        return logits.token_losses(labels.transpose(0, 1).contiguous()).transpose(0, 1).contiguous()

    return compute_language_model_loss


def _acceptance(upstream: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """How many of the further tokens were predicted, for the log of multi-token prediction."""

    @functools.wraps(upstream)
    def _compute_mtp_acceptance_counts(
        mtp_logits: Any, mtp_labels: Tensor, loss_mask: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(mtp_logits, DeferredLogits):
            return upstream(mtp_logits, mtp_labels, loss_mask, *args, **kwargs)
        counts = loss_mask.bool()
        right = (mtp_logits.predictions().transpose(0, 1) == mtp_labels) & counts
        return right.sum().float(), counts.sum().float()

    return _compute_mtp_acceptance_counts
