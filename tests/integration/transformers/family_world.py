"""What two ranks find of families, faults and noise, all in one world: its start costs as much as several families."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import families
import torch
from hf_models import build_model, micro_batch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.neftune import activate_neftune

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError, SequenceParallelGroups
from dsp_plugin.patches.transformers import ShardedCausalLM, tiny, trials
from dsp_plugin.sharding.parallelize import hooked
from dsp_plugin.verification.model import Verdict, compare
from dsp_plugin.verification.own_model import Report, Request, report_of

SIZE = 2
SECTION = {"method": "ring", "size": SIZE}
ALPHA = 5.0
# By family and feature what is expected. Each is here for something that it does otherwise than Llama.
COVERED: dict[str, dict[str, str]] = {
    # Positions start behind the index of padding, and padding has none; masks that do not look at positions.
    "roberta": {"tokens": "exact", "padded": "exact", "embedded": "exact", "packed": "refused"},
    "camembert": {"tokens": "exact"},
    "xlm-roberta": {"tokens": "exact"},
    "data2vec-text": {"tokens": "exact"},
    # Windows that only the mask knows of.
    "qwen2_moe": {"tokens": "exact", "windowed": "exact", "packed": "exact"},
    "phimoe": {"tokens": "exact", "windowed": "exact"},
    "opt": {"tokens": "exact", "packed": "refused"},
    "afmoe": {"tokens": "exact", "packed": "refused"},
    "bert": {"tokens": "exact", "packed": "refused"},
    # Learnt positions and packed rows; layers of both kinds; sinks; chunks.
    "gpt2": {"tokens": "exact", "packed": "exact", "recomputed": "exact"},
    "gemma3_text": {"tokens": "exact", "packed": "exact"},
    "gpt_oss": {"tokens": "refused"},
    "llama4_text": {"tokens": "refused"},
}
# What a refusal tells to write in place of a section that trains wrong.
DESCRIBED: dict[str, Any] = {
    **{"method": "ulysses", "size": SIZE, "layout": "contiguous"},
    **{"batch": {"input_ids": 1}, "attention": ["model.layers.*.self_attn"], "gather_output": 1},
}


class LossOutside(nn.Module):
    """What a script does around its model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss over the labels that follow."""
        logits = self.model(input_ids, use_cache=False).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def as_the_refusal_says() -> Verdict:
    """The loss from whole logits, of a model that the section describes."""
    config = SequenceParallelConfig(**DESCRIBED)
    groups = SequenceParallelGroups.build(config)
    torch.manual_seed(0)
    model = LossOutside(build_model("llama", attn_implementation="sdpa").double())
    batch = micro_batch("tokens", 0, 0, 0)
    return compare(model, [batch], lambda m, g: hooked(m.model, config=config, groups=g), groups)


def located(fault: str, groups: SequenceParallelGroups) -> Verdict:
    """What is found of a model with a fault that only its sharded copy has."""
    model = tiny.random_model(LlamaForCausalLM, tiny.shrunk(LlamaConfig()))

    def shard(copy: Any, groups: SequenceParallelGroups) -> Any:
        handle = trials.shard(copy, groups, SECTION)
        part = copy.model.layers[1].mlp
        if fault == "output":
            part.register_forward_hook(lambda _, __, output: output * 1.01)
        if fault == "gradient":
            part.register_full_backward_hook(lambda _, gradients, __: tuple(gradient * 1.01 for gradient in gradients))
        return handle

    return compare(trials.prepared(model, "tokens"), trials.batches(model, "tokens"), shard, groups)


def noises(groups: SequenceParallelGroups) -> dict[str, Any]:
    """NEFTune's noise of many passes on this rank, and alpha after them."""
    torch.manual_seed(0)
    model = build_model("llama")
    handle = ShardedCausalLM(model, SequenceParallelConfig(**SECTION), groups)
    activate_neftune(model, ALPHA)
    embeddings, seen = model.get_input_embeddings(), []
    embeddings.register_forward_hook(lambda module, args, output: seen.append(output - module.weight[args[0]]))
    for step in range(20):
        model(**micro_batch("tokens", step, 0, 0))
    model(**micro_batch("short", 0, 0, 0))
    model.eval()(**micro_batch("tokens", 0, 0, 0))
    *noisy, short, silent = [noise.detach() for noise in seen]
    refused = ""
    try:
        model.train()(**{name: value[:, :1] for name, value in micro_batch("tokens", 0, 0, 0).items()})
    except SequenceParallelConfigError as error:
        refused = str(error)
    handle.remove()
    return {
        "largest": torch.stack(noisy).abs().max().item(),
        "deviation": torch.stack(noisy).std().item(),
        "first": noisy[0][0, 0].tolist(),
        "short": short.abs().max().item() * math.sqrt(short.shape[-1]),
        "silent": silent.abs().max().item(),
        "alpha": embeddings.neftune_noise_alpha,
        "width": noisy[0].shape[-1],
        "refused": refused,
    }


class Wrong(LlamaForCausalLM):
    """A model that numbers its tokens itself, whatever it is told."""

    def forward(self, *args: Any, position_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As if its part of the sequence were all."""
        if position_ids is not None:
            position_ids = torch.arange(position_ids.shape[1]).unsqueeze(0)
        return super().forward(*args, position_ids=position_ids, **kwargs)


def wrong() -> Wrong:
    """Its function, as a user has one."""
    return Wrong(LlamaConfig(num_hidden_layers=1))


class Plain(nn.Module):
    """A model of nobody's but the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 8), nn.Linear(8, 24)
        self.attention = Attention()
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss over labels that are shifted already."""
        mixed = self.head(self.attention(self.mix(self.embed(tokens))))
        return nn.functional.cross_entropy(mixed.flatten(0, 1), labels.flatten(), ignore_index=-100)


class Attention(nn.Module):
    """Causal, with two heads."""

    def forward(self, mixed: torch.Tensor) -> torch.Tensor:
        """``[B, n, 3 * 8]`` to ``[B, n, 8]``."""
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in mixed.chunk(3, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).flatten(2)


def plain() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model and a batch, as a user's function returns them."""
    tokens = torch.randint(11, (2, 13))
    return Plain(), {"tokens": tokens, "labels": tokens.roll(-1, 1)}


PLAIN_SECTION = {
    **{"method": "ulysses", "size": SIZE, "batch": {"tokens": 1, "labels": 1}, "attention": ["attention"]},
    **{"loss": {"labels": "labels"}, "positions": None},
}


def own_models(folder: str) -> dict[str, Report]:
    """The user's models by name."""
    here = Path(__file__).stem
    return {
        "folder": report_of(Request(folder, SECTION)),
        "wrong": report_of(Request(f"{here}:wrong", SECTION)),
        "plain": report_of(Request(f"{here}:plain", PLAIN_SECTION)),
    }


def everything(folder: str) -> dict[str, Any]:
    """All of it, on one rank of a world of two."""
    groups = SequenceParallelGroups.build(SequenceParallelConfig(**SECTION))
    return {
        "families": families.survey({family: list(expected) for family, expected in COVERED.items()}),
        "described": as_the_refusal_says(),
        "located": {fault: located(fault, groups) for fault in ("output", "gradient")},
        "noise": noises(groups),
        "own": own_models(folder),
    }
