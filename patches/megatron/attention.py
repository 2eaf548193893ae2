"""Core attention: Megatron's query, key and value shards to a method of ours, whatever layer spec built the model.

Megatron's local `DotProductAttention` is dense and asserts a context-parallel size of 1; Transformer Engine's is not
needed. Both are replaced where the layer is built, so projections, rotary embeddings, tensor parallelism and
recomputation stay Megatron's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsp_plugin.config.attention import attention_of
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout
from dsp_plugin.mask import Band, MaskSpec
from dsp_plugin.methods import Where
from dsp_plugin.patches.megatron.mask import document_borders
from dsp_plugin.patches.megatron.recompute import check_checkpoints
from dsp_plugin.patches.megatron.state import MegatronState, attending, order_of
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch
from dsp_plugin.training.randomness import draw_seed

_SOFTMAX_CORES = ("DotProductAttention", "TEDotProductAttention")
_CAUSAL = ("causal", "causal_bottom_right", "padding_causal")
_FULL = ("no_mask", "padding")


def patches(state: MegatronState) -> tuple[Patch, ...]:
    """Wraps the constructors of self-attention. Cross-attention keeps upstream's: its keys are another sequence."""
    return tuple(
        Patch(
            f"megatron core attention of {layer}",
            f"megatron.core.transformer.{module}:{layer}.__init__",
            DISTRIBUTION,
            SUPPORTED,
            functools.partial(_build_with_ours, state),
            ("self", "config", "submodules", "layer_number"),
        )
        for module, layer in (("attention", "SelfAttention"), ("multi_latent_attention", "MLASelfAttention"))
    )


def _build_with_ours(state: MegatronState, upstream: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N807
        call = signature.bind(*args, **kwargs)
        if call.arguments["config"].context_parallel_size > 1:
            submodules = call.arguments["submodules"]
            _check_layer(
                state, call.arguments["config"], submodules.core_attention, call.arguments.get("pg_collection")
            )
            # A class, because that is the one form in which both attention layers build a core attention.
            ours = type("SequenceParallelAttention", (CoreAttention,), {"state": state})
            call.arguments["submodules"] = replace(submodules, core_attention=ours)
        upstream(*call.args, **call.kwargs)

    return __init__


def check_groups(state: MegatronState, config: Any, process_groups: Any) -> None:
    """Refuses a layer that would communicate on other ranks than those that share its sequence.

    Raises:
        UnsupportedError: it is built on other groups than Megatron's.
        SequenceParallelConfigError: there are none yet, or their size is not that of the model's configuration.
    """
    if state.config is None or state.groups is None:
        raise SequenceParallelConfigError(
            setting="context_parallel_size",
            value=config.context_parallel_size,
            why="a layer is built before parallel_state.initialize_model_parallel has made the groups",
            remedy="initialize model parallelism first",
        )
    if config.context_parallel_size != state.config.size:
        raise SequenceParallelConfigError(
            setting="TransformerConfig.context_parallel_size",
            value=config.context_parallel_size,
            why=f"initialize_model_parallel was called with context_parallel_size={state.config.size}",
            remedy="give both the same value",
        )
    group = getattr(process_groups, "cp", None)
    if group is not None and tuple(dist.get_process_group_ranks(group)) != state.groups.sp.ranks:
        raise UnsupportedError(
            setting="pg_collection.cp",
            value=dist.get_process_group_ranks(group),
            why=f"the plugin works on parallel_state's context-parallel group, here of ranks {state.groups.sp.ranks}",
            remedy="build the model on parallel_state's groups",
        )


def _check_layer(state: MegatronState, config: Any, core: Any, process_groups: Any) -> None:
    """Refuses what the replacement would silently compute otherwise.

    Raises:
        UnsupportedError: the layer's attention is not plain softmax attention, or runs on other groups than Megatron's.
        SequenceParallelConfigError: the method cannot serve the layer, or its heads.
    """
    if state.settings.method not in attending():
        raise SequenceParallelConfigError(
            setting="--sp-method",
            value=state.settings.method,
            why="this model's layers attend along the one dim that its tokens have, and the method shards a dim along "
            "which a layer does not compute",
            remedy=f"use one of {', '.join(attending())}; dsp is for models of several dims, such as "
            "dsp_plugin.patches.megatron.video_dit and vit",
        )
    check_groups(state, config, process_groups)
    check_checkpoints(state, config)
    assert state.config is not None
    core = getattr(core, "func", core)
    core = getattr(core, "module", core)
    name = getattr(core, "__name__", str(core))
    if name not in _SOFTMAX_CORES:
        raise UnsupportedError(
            setting="core_attention",
            value=name,
            why=f"the plugin replaces plain softmax attention ({', '.join(_SOFTMAX_CORES)}); this is something else",
            remedy="use a spec with one of these, or drop --sp-method",
        )
    for setting, plain in (
        *(("softmax_type", "vanilla"), ("qk_clip", False), ("log_max_attention_logit", False)),
        *(("fp8_dot_product_attention", False), ("fp8_multi_head_attention", False)),
    ):
        value = getattr(config, setting, plain)
        if value != plain:
            raise UnsupportedError(
                setting=setting,
                value=value,
                why="no attention kernel of the plugin computes it",
                remedy=f"set it to {plain!r}, or train this model without --sp-method",
            )
    state.config.check_model(
        heads=config.num_attention_heads,
        kv_heads=config.num_query_groups,
        tensor_parallel_size=config.tensor_model_parallel_size,
    )


class CoreAttention(nn.Module):
    """Megatron's core attention on a sequence shard, in the order that the method takes.

    Takes Megatron's build arguments; those that only Transformer Engine uses are ignored. Subclassed once per
    installation, to carry its `state`.
    """

    state: MegatronState

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **transformer_engine: Any,
    ) -> None:
        from megatron.core.transformer.utils import is_layer_window_attention

        super().__init__()
        self.config = config
        self.attn_mask_type = attn_mask_type
        # apply_query_key_layer_scaling needs nothing: upstream divides the scale by the layer number and multiplies it
        # back in fp32.
        self.scale = softmax_scale
        self.dropout_p = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = _window(config.window_size) if windowed else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **transformer_engine: Any,
    ) -> Tensor:
        """Attention of this rank's queries to the whole sequence.

        Args:
            query: ``[s/cp, b, h, d]``, h the query heads of one tensor-parallel rank, rotary embeddings applied.
            key: ``[s/cp, b, k, d]``.
            value: ``[s/cp, b, k, dv]``.
            attention_mask: None, or True where hidden: what `attn_mask_type` says, in documents.
            attn_mask_type: Megatron's; that of the layer when None.

        Returns:
            ``[s/cp, b, h * dv]``.

        Raises:
            UnsupportedError: a bias, packed sequences, a key/value cache or a mask of other structure.
        """
        groups, config = self.state.groups, self.state.config
        assert groups is not None, "model parallelism was destroyed under a living model"
        assert config is not None
        _refuse_inputs(query, key, attention_bias, packed_seq_params)
        layout = Layout(order_of(config), query.shape[0] * groups.sp.size, groups.sp.size)
        kind = (attn_mask_type or self.attn_mask_type).name
        mask = self._mask(kind, attention_mask, layout)
        dropout_p = self.dropout_p if self.training else 0.0
        out = attention_of(config, config.for_softmax)(
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            what=AttentionSpec(mask, self.scale, dropout_p, self._draw_seed(query.device) if dropout_p > 0.0 else None),
            where=Where(groups, layout),
        )
        return out.transpose(0, 1).flatten(2)

    def _mask(self, kind: str, attention_mask: Tensor | None, layout: Layout) -> MaskSpec:
        """The mask of a type, in the documents that a mask tensor keeps apart."""
        if kind not in _CAUSAL + _FULL:
            raise UnsupportedError(
                setting="attn_mask_type",
                value=kind,
                why=f"masks are {', '.join(_CAUSAL + _FULL)}; any other is a dense tensor, the square of the "
                "sequence in size",
                remedy="use one of these, with window_size for sliding windows",
            )
        causal = kind in _CAUSAL
        borders = None
        if attention_mask is not None:
            borders = document_borders(attention_mask, causal, layout, self.state)
        return _mask(causal, self.window, borders)

    def _draw_seed(self, device: torch.device) -> int:
        """A seed from Megatron's generator for model-parallel regions: new on each call and replayed by recomputation.

        That generator has the same state on all context-parallel ranks and another on each tensor-parallel rank, which
        is what one mask over all heads takes.
        """
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        if self.config.sequence_parallel:
            # As upstream: the transformer block has switched to that generator already.
            return draw_seed(device)
        with get_cuda_rng_tracker().fork():
            return draw_seed(device)


@functools.lru_cache(maxsize=16)
def _mask(causal: bool, window: Band | None, borders: tuple[int, ...] | None) -> MaskSpec:
    """One for all layers that ask for the same, which looks at its borders once."""
    return MaskSpec(causal=causal, window=window, cu_seqlens=borders)


def _window(size: tuple[int, int]) -> tuple[int | None, int | None]:
    """Megatron's (left, right), -1 for unbounded, as ours."""
    left, right = size
    return (None if left < 0 else left), (None if right < 0 else right)


def _refuse_inputs(query: Tensor, key: Tensor, attention_bias: Tensor | None, packed_seq_params: Any) -> None:
    if packed_seq_params is not None:
        raise UnsupportedError(
            setting="packed_seq_params",
            value=getattr(packed_seq_params, "qkv_format", "thd"),
            why="Megatron cuts packed sequences document by document, an order that no method of the plugin takes here",
            remedy="keep documents apart by --reset-attention-mask, train on unpacked sequences, or use Transformer "
            "Engine's context parallelism without --sp-method",
        )
    if attention_bias is not None:
        raise UnsupportedError(
            setting="attention_bias",
            value=tuple(attention_bias.shape),
            why="no attention kernel of the plugin adds a bias to the logits",
            remedy="use rotary embeddings, or train this model without --sp-method",
        )
    if query.shape[0] != key.shape[0]:
        raise UnsupportedError(
            setting="sequence length",
            value=f"{query.shape[0]} queries, {key.shape[0]} keys",
            why="queries and keys must be the same tokens; a key/value cache is inference, which is not sharded",
            remedy="generate with context_parallel_size 1",
        )
