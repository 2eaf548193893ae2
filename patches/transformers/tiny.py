"""Tiny random models of any family: what `dsp-plugin verify-model` and the page of families compare.

A config is shrunk by the names of its settings, which families share for the most part. What makes layers differ from
each other is kept: of the layers as the config lists them, the first of every kind.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HEADS, KV_HEADS, HEAD_DIM, WIDTH, WINDOW, VOCABULARY, POSITIONS, LAYERS = 4, 2, 8, 32, 5, 61, 96, 2
# The most layers that are kept for the sake of their kinds.
MOST_LAYERS = 6

# What a setting of this name becomes, the first that fits; where it is a whole number, and larger.
SIZES: tuple[tuple[str, int], ...] = tuple(
    (rf"(?:{names})$", size)
    for names, size in (
        (r"(\w+_)?vocab(ulary)?_size(_\w+)?|ngram_vocab_size_base|encoder_hash_byte_group_vocab", VOCABULARY),
        (r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|num_query_groups", KV_HEADS),
        (r"linear_num_key_heads|n_group|num_expert_group|n_groups|o_groups|topk_group|mamba_n_groups|mamba_ngroups", 1),
        (
            r"(\w+_)?num_attention_heads|n_heads?|num_heads|(\w+_)?attention_heads|index_n_heads|\w*num_value_heads",
            HEADS,
        ),
        (r"linear_num_heads|mamba_num_heads|mamba_n_heads|n_mamba_heads|num_mamba_heads", HEADS),
        (r"qk_rope_head_dim|rotary_dim|rope_head_dim", HEAD_DIM // 2),
        (r"qk_head_dim", HEAD_DIM + HEAD_DIM // 2),
        (r"(\w+_)?head_dim|dim_head|d_head|kv_channels|attention_head_size|mamba_d_head|mamba_headdim", HEAD_DIM),
        (r"query_pre_attn_scalar", HEAD_DIM),
        (r"(\w+_)?(lora_rank|rank)|d_rel|ngram_size", HEAD_DIM),
        (r"(\w+_)?intermediate_size(_mlp)?|(\w+_)?ffn_dim|ffn_hidden_size|\w*ffn_hidden_size|n_inner", 48),
        (r"dff|dim_ff|d_inner|feed_forward_size|prompt_mid_dim", 48),
        (r"d_model|n_embd|(\w+_)?hidden_size|hidden_dim|dim|emb_dim|(\w+_)?embed(ding)?_(dim|size)|lru_width", WIDTH),
        (
            r"word_embed_proj_dim|embedding_size|mamba_d_ssm|dim_model_base|attention_hidden_size|router_hidden_size",
            WIDTH,
        ),
        (r"hidden_size_per_layer_input", HEAD_DIM),
        (r"moe_num_shared_experts|n(um)?_shared_experts|zero_expert_num", 1),
        (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 4),
        (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k|index_topk(_blocks)?", 2),
        (r"sliding_window(_size)?|local_attention(_window_len)?|attention_window_size|window_size", WINDOW),
        (r"attention_chunk_size|keep_window_size", WINDOW),
        (r"(max_|n_)positions?|(\w+_)?max_position_embeddings|max_seq_len|n_ctx|model_max_length", POSITIONS),
        (r"max_(source|target)_positions|context_length", POSITIONS),
        (r"\w*state_size|mamba_d_state|\w*chunk_(size|length)|block_size|index_block_size", HEAD_DIM),
        (r"time_step_rank|mamba_dt_rank|pronunciation_embed_dim|shape_embed_dim", HEAD_DIM),
        (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    )
)
# The decoder's first: encoders are not built.
LAYER_COUNTS = (
    *("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("encoder_layers", "num_encoder_layers", "num_layers_per_stack"),
)
OTHER_COUNTS = ("max_window_layers", "num_nextn_predict_layers", "num_kv_shared_layers")
# Settings that list layers by number.
NUMBERED = ("mlp_only_layers", "moe_layers", "full_attn_idxs", "hybrid_layer_ids", "cross_attention_layers")
# What families leave open in their configs, which their models cannot do without.
OPEN = {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS, "num_experts_per_tok": 2, "n_routed_experts": 4}
METADATA = ("torch_dtype", "dtype", "architectures", "transformers_version", "model_type", "name_or_path", "auto_map")
TOKENS = re.compile(r"\w*_token_id$|\w*_index$")


def shrunk(config: PretrainedConfig, **changes: Any) -> PretrainedConfig:
    """A tiny config of the same class: narrow, of few layers, without dropout, with every window shorter than a batch.

    Args:
        changes: settings that are as given.

    Raises:
        ValueError: of Transformers, where the settings no longer fit each other.
    """
    own = vars(config)
    given = {name: own.get(name, value) for name, value in config.to_dict().items()}
    small = _small(given)
    kind = type(config)
    settings = {name: value for name, value in {**small, **changes}.items() if name not in kind.sub_configs}
    for name in kind.sub_configs:
        part = given.get(name)
        if part is not None and not isinstance(part, Mapping):
            settings[name] = shrunk(part)
    return kind(**settings)


def windows(config: PretrainedConfig) -> dict[str, Any]:
    """The changes that give layers sliding windows in a family that has them only where its config asks for them."""
    given = config.to_dict()
    if "sliding_window" not in given or (given["sliding_window"] is not None and given.get("use_sliding_window", True)):
        return {}
    asked: dict[str, Any] = {"sliding_window": WINDOW}
    if "use_sliding_window" in given:
        asked["use_sliding_window"] = True
    if given.get("layer_types") is not None:
        asked["layer_types"] = ["full_attention", "sliding_attention"]
        asked["num_hidden_layers"] = LAYERS
    return asked


def random_model(kind: Any, config: PretrainedConfig, seed: int = 0) -> Any:
    """A model of the class in fp64, whose experts are computed by plain code: grouped kernels have no fp64."""
    import torch

    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    # Decays that a model computes when it is built are as wide as what it is compared by.
    torch.set_default_dtype(torch.float64)
    try:
        model = kind(config)
    finally:
        torch.set_default_dtype(before)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.double()


def changed(before: PretrainedConfig, after: PretrainedConfig) -> dict[str, tuple[Any, Any]]:
    """What shrinking changed: setting, before and after."""
    old, new = vars(before), vars(after)
    unshown = {*type(before).sub_configs, *METADATA}
    return {
        name: (old[name], value)
        for name, value in new.items()
        if name in old and old[name] != value and not name.startswith("_") and name not in unshown
    }


def _small(given: Mapping[str, Any]) -> dict[str, Any]:
    layers = next((given[name] for name in LAYER_COUNTS if isinstance(given.get(name), int)), None)
    kept = _kept_layers(given, layers) if layers else []
    small: dict[str, Any] = {}
    for name, value in given.items():
        if name in NUMBERED and isinstance(value, list | tuple):
            small[name] = [kept.index(layer) for layer in value if layer in kept]
        elif layers and name in LAYER_COUNTS:
            small[name] = len(kept)
        elif name == "per_layer_config" and isinstance(value, Mapping):
            layer_of = {str(layer): kept.index(layer) for layer in kept}
            small[name] = {layer_of[str(at)]: _small(part) for at, part in value.items() if str(at) in layer_of}
        elif layers and isinstance(value, list | tuple) and len(value) == layers:
            small[name] = type(value)(value[layer] for layer in kept)
        elif name in OTHER_COUNTS and isinstance(value, int):
            small[name] = min(value, 1)
        else:
            small[name] = _size(name, value, given)
    for removed in METADATA:
        small.pop(removed, None)
    return small


def _size(name: str, value: Any, given: Mapping[str, Any]) -> Any:
    if isinstance(value, float) and ("drop" in name or "jitter" in name):
        return 0.0
    if value is None:
        return OPEN.get(name)
    if name == "head_dim" and value == given.get("qk_rope_head_dim"):
        return HEAD_DIM // 2
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if TOKENS.match(name):
        return value if value < VOCABULARY else 3
    for pattern, size in SIZES:
        if re.match(pattern, name):
            if size == KV_HEADS and value == given.get("num_attention_heads"):
                return HEADS
            return min(value, size)
    return value


def _kept_layers(given: Mapping[str, Any], layers: int) -> list[int]:
    """The first layer of every kind, as the settings that have an entry for each layer tell kinds apart."""
    lists = [v for v in given.values() if isinstance(v, list | tuple) and len(v) == layers]
    kinds: dict[str, int] = {}
    for layer in range(layers):
        kinds.setdefault(str([entries[layer] for entries in lists]), layer)
    kept = list(kinds.values())[:MOST_LAYERS]
    return kept + [layer for layer in range(layers) if layer not in kept][: max(LAYERS - len(kept), 0)]
