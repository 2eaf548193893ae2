"""Small causal language models of Transformers with random weights, and their batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

MICRO, VOCABULARY = 2, 31
# No count of ranks that is tested divides it, and the windows are shorter.
LENGTH, WINDOW = 13, 5
SHAPE = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
FAMILIES: dict[str, tuple[type[PreTrainedModel], type, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}),
    # One layer of each kind, biases on q, k and v.
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    # Norms on q and k, a head dim of its own, tied embeddings.
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {
            "hidden_size": 32,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 8,
            "tie_word_embeddings": True,
        },
    ),
    "mistral": (
        MistralForCausalLM,
        MistralConfig,
        {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": WINDOW},
    ),
    # Hybrids: one layer of the gated delta rule, of Mamba-2, of lightning attention, and one that attends.
    "qwen3_next": (
        Qwen3NextForCausalLM,
        Qwen3NextConfig,
        {
            **{"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
            **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 0},
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "bamba": (
        BambaForCausalLM,
        BambaConfig,
        {
            **{"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1]},
            **{"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2},
        },
    ),
    "minimax": (
        MiniMaxForCausalLM,
        MiniMaxConfig,
        {
            **{"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
            **{"num_local_experts": 2, "num_experts_per_tok": 2, "block_size": 4},
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}
HYBRIDS = ("qwen3_next", "bamba", "minimax")


def build_model(family: str, checkpointing: str = "", **changes: Any) -> PreTrainedModel:
    """The model in training mode; its weights depend on torch's seed.

    Args:
        checkpointing: "", "reentrant" or "plain": whether layers are recomputed, and how.
    """
    kind, config, shape = FAMILIES[family]
    model = kind(config(**{**SHAPE, **shape, **changes})).train()
    if checkpointing:
        use_reentrant = checkpointing == "reentrant"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


def micro_batch(kind: str, step: int, micro: int, replica: int) -> dict[str, Any]:
    """The batch of one replica in one micro step, as Transformers takes it: labels unshifted.

    Args:
        kind: "tokens"; "short" (fewer tokens than ranks or runs of a layout); "packed" (three documents to a row, by
            positions); "padded" (after the tokens); "items" (with `num_items_in_batch`); "embedded" (no input_ids);
            "unlabelled" (the script takes the loss from the logits).
    """
    generator = torch.Generator().manual_seed(1 + replica + 100 * micro + 10_000 * step)
    length = 3 if kind == "short" else LENGTH
    tokens = torch.randint(VOCABULARY, (MICRO, length), generator=generator)
    labels = tokens.clone()
    if kind != "short":
        # A prompt: the first rank's tokens count least, so a mean of the ranks' means is far off.
        labels[0, :7] = -100
        labels[1, :4] = -100
    batch: dict[str, Any] = {"input_ids": tokens, "labels": labels}
    if kind == "packed":
        batch["position_ids"] = torch.cat([torch.arange(n) for n in (6, 1, length - 7)]).expand(MICRO, -1)
        # With a cache, which is Transformers' default, its eager attention does not keep documents apart.
        batch["use_cache"] = False
    if kind == "padded":
        batch["attention_mask"] = torch.ones_like(tokens)
        batch["attention_mask"][1, -4:] = 0
        labels[1, -4:] = -100
    if kind == "items":
        batch["num_items_in_batch"] = 29
    return batch


def micro_loss(kind: str, model: Any, batch: dict[str, Any]) -> Tensor:
    """The loss as a script takes it; ``model`` may be DeepSpeed's engine."""
    if kind == "unlabelled":
        labels = batch["labels"]
        logits = model(input_ids=batch["input_ids"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
    if kind == "embedded":
        network = getattr(model, "module", model)
        embedded = network.get_input_embeddings()(batch["input_ids"])
        return model(inputs_embeds=embedded, labels=batch["labels"]).loss
    return model(**batch).loss
