"""Small models of Transformers that the planner's arithmetic is compared with, as subjects of dry runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def llama(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocabulary: int,
    length: int,
    recomputed: int,
) -> tuple[nn.Module, dict[str, Any]]:
    """A Llama and one sequence; layers are recomputed or not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(1, length, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids}
