"""Layer specs of models with linear attention: for `GPTModel`, and for the stacks of `HybridModel`.

Each is derived from Megatron's own spec of a softmax layer, whose norms, MLP or experts and projections it keeps.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.patches.megatron.models.linear_attention import LinearAttention, LinearAttentionSubmodules


def linear_layer_spec(softmax_layer: Any, *, decay: str = "gated-delta", convolution: bool = True) -> Any:
    """A layer with linear attention in place of self-attention.

    Args:
        softmax_layer: Megatron's `ModuleSpec` of a `TransformerLayer`, such as ``get_gpt_layer_local_spec()`` or
            ``get_gpt_layer_with_transformer_engine_spec()``; it is not changed.
        decay, convolution: see `LinearAttention`.

    Returns:
        A `ModuleSpec`.
    """
    from megatron.core.transformer.spec_utils import ModuleSpec

    softmax = softmax_layer.submodules.self_attention.submodules
    attention = ModuleSpec(
        module=LinearAttention,
        params={"decay": decay, "convolution": convolution},
        submodules=LinearAttentionSubmodules(in_proj=softmax.linear_qkv, out_proj=softmax.linear_proj),
    )
    return replace(softmax_layer, submodules=replace(softmax_layer.submodules, self_attention=attention))


def hybrid_layer_specs(
    config: Any,
    *,
    decay: str = "gated-delta",
    convolution: bool = True,
    use_transformer_engine: bool | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> Any:
    """The layers of this pipeline stage of a GPT with linear attention in place of softmax attention.

    Args:
        config: Megatron's `TransformerConfig`. Its ``linear_attention_freq``, which Megatron's checkpoints read too,
            says which layers stay softmax attention: every k-th for a number k, those with a 0 in a list; None for no
            layer.
        decay, convolution: see `LinearAttention`.
        use_transformer_engine: as ``config.transformer_impl`` says when None.
        vp_stage: the virtual pipeline stage, of models that have some.
        pp_rank: this rank's when None.

    Returns:
        `TransformerBlockSubmodules`, for the ``transformer_layer_spec`` of `GPTModel`.

    Raises:
        SequenceParallelConfigError: ``linear_attention_freq`` is neither.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    if use_transformer_engine is None:
        use_transformer_engine = config.transformer_impl == "transformer_engine"
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_transformer_engine,
        normalization=config.normalization,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    linear = _is_linear(config)
    layers = [
        linear_layer_spec(layer, decay=decay, convolution=convolution) if linear[number] else layer
        for layer, number in zip(block.layer_specs, _layer_numbers(config, vp_stage, pp_rank), strict=True)
    ]
    return replace(block, layer_specs=layers)


def gated_delta_gpt(model_config: Any, vp_stage: int | None = None) -> Any:
    """For `megatron.training`: ``--spec dsp_plugin.patches.megatron.linear_specs gated_delta_gpt``.

    Every ``--linear-attention-freq``-th layer is softmax attention, the others Gated DeltaNet.

    Args:
        model_config: Megatron's `GPTModelConfig`.
    """
    return hybrid_layer_specs(model_config.transformer, vp_stage=vp_stage)


def _is_linear(config: Any) -> list[bool]:
    """Of each layer of the model."""
    every, layers = config.linear_attention_freq, config.num_layers
    if every is None:
        return [True] * layers
    if isinstance(every, list) and len(every) == layers:
        return [bool(linear) for linear in every]
    if not isinstance(every, int) or every < 1:
        raise SequenceParallelConfigError(
            setting="linear_attention_freq",
            value=every,
            why=f"of {layers} layers every k-th is softmax attention, k of 1 or more, or those with a 0 in a list",
            remedy=f"give a number, a list of {layers} zeros and ones, or None for linear attention alone",
        )
    return [number % every != 0 for number in range(1, layers + 1)]


def _layer_numbers(config: Any, vp_stage: int | None, pp_rank: int | None) -> list[int]:
    """Which layers of the model this stage has, counting from 0; as `get_gpt_decoder_block_spec` chooses them."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    place = {"vp_stage": vp_stage, "pp_rank": pp_rank}
    if config.pipeline_model_parallel_layout is not None:
        numbers: list[int] = config.pipeline_model_parallel_layout.get_layer_id_list(
            layer_type=LayerType.decoder, **place
        )
        return numbers
    first = get_transformer_layer_offset(config, **place)
    return list(range(first, first + get_num_layers_to_build(config, **place)))
