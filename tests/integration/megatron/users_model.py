"""What a user's training script imports from its own folder: the model, built from Megatron's arguments."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.training import get_args, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args


def gpt_builder(args: Any, pre_process: bool, post_process: bool, vp_stage: int | None, **given: Any) -> GPTModel:
    """A GPT of local layers."""
    print_rank_0(f"building the model, {args.note}")
    return GPTModel(
        config=core_transformer_config_from_args(args),
        transformer_layer_spec=get_gpt_layer_local_spec(),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        vp_stage=vp_stage,
        pg_collection=given.get("pg_collection"),
    )


def model_provider(builder: Any, pre_process: bool = True, post_process: bool = True, **given: Any) -> GPTModel:
    """One pipeline stage, by one of the builders that this script knows."""
    return builder(get_args(), pre_process, post_process, given.pop("vp_stage", None), **given)


def _hybrid_stack() -> ModuleSpec:
    """Attention and MLP layers for hybrid models, without Transformer Engine: hence without a last norm."""
    parts = get_gpt_layer_local_spec().submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=parts.input_layernorm, self_attention=parts.self_attention, self_attn_bda=parts.self_attn_bda
    )
    mlp = TransformerLayerSubmodules(pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda)
    stack = HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
    )
    return ModuleSpec(module=HybridStack, params={"post_layer_norm": False}, submodules=stack)


# For `--spec users_model hybrid_stack`.
hybrid_stack = _hybrid_stack()
