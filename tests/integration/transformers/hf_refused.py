"""Models and batches that must be refused on every rank, in a world of 2: what is wrong, and what the message says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hf_features import start
from hf_models import LENGTH, MICRO, SHAPE, build_model, micro_batch
from transformers import (
    EsmConfig,
    EsmForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

CONFIG, UNSUPPORTED = "SequenceParallelConfigError", "UnsupportedError"
NARROW = {**SHAPE, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


LLAMA = partial(build_model, "llama")


@dataclass(frozen=True)
class Refused:
    """A model that cannot be sharded, or a forward pass of one that can.

    Attributes:
        says: fragments of the message.
        model: makes the model.
        call: changes to the arguments of forward; without any, the model itself is refused.
        section: further settings.
    """

    error: str
    says: tuple[str, ...]
    model: Callable[[], PreTrainedModel] = LLAMA
    method: str = "ring"
    call: dict[str, Any] = field(default_factory=dict)
    section: dict[str, Any] = field(default_factory=dict)


def with_own_loss() -> PreTrainedModel:
    """A model that a script gave a loss function."""
    model = build_model("llama")
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.mean()
    return model


class Unnumbered(LlamaForCausalLM):
    """A model whose forward takes no positions."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        return super().forward(input_ids, labels=labels)


class HeadedForCausalLM(LlamaForCausalLM):
    """A model whose logits are made as `head` has it."""

    head: Callable[[Any, torch.Tensor], torch.Tensor]

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> Any:
        hidden = self.model(input_ids, attention_mask, position_ids, use_cache=use_cache).last_hidden_state
        logits = type(self).head(self, hidden)
        return {"loss": self.loss_function(logits, labels, self.vocab_size), "logits": logits}


class PenalizedForCausalLM(HeadedForCausalLM):
    """Some words are less likely."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.lm_head(hidden)
        logits[..., :3] -= 1.0
        return logits


class ByHandForCausalLM(HeadedForCausalLM):
    """Its head is no call of the module."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(hidden, self.lm_head.weight)


def hooked_head() -> PreTrainedModel:
    """A script's own hook looks at logits, or changes them."""
    model = build_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 2)
    return model


def adapted(kind: str, **settings: Any) -> Callable[[], Any]:
    """A model that PEFT wraps."""

    def make() -> Any:
        import peft

        return peft.get_peft_model(build_model("llama"), getattr(peft, kind)(task_type="CAUSAL_LM", **settings))

    return make


def mask(*zeros: slice) -> torch.Tensor:
    """Ones, but for a run of the last row."""
    found = torch.ones(MICRO, LENGTH, dtype=torch.int64)
    for run in zeros:
        found[-1, run] = 0
    return found


def positions(*documents: tuple[int, ...]) -> torch.Tensor:
    """Positions of rows of documents of the given lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in documents])


TILES = {"memory": {"tile_tokens": 3}}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
SOFT_CAPPED = partial(Gemma2ForCausalLM, Gemma2Config(**NARROW, head_dim=8, query_pre_attn_scalar=8))
REFUSED = {
    "encoder_and_decoder": Refused(
        UNSUPPORTED,
        ("T5ForConditionalGeneration", "one sequence of tokens", '"attention"'),
        partial(
            T5ForConditionalGeneration, T5Config(vocab_size=31, d_model=16, d_ff=8, num_layers=1, num_heads=2, d_kv=8)
        ),
    ),
    "unverified_encoder": Refused(
        UNSUPPORTED,
        ("EsmForMaskedLM", "is not among them", "a run without the section", '"unverified_model": true'),
        partial(
            EsmForMaskedLM,
            EsmConfig(
                vocab_size=31,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=8,
                pad_token_id=0,
                mask_token_id=1,
            ),
        ),
    ),
    "recurrent": Refused(
        UNSUPPORTED,
        ("RwkvForCausalLM", "otherwise than we know how to", "layers are of these kinds"),
        partial(RwkvForCausalLM, RwkvConfig(vocab_size=31, hidden_size=16, num_hidden_layers=2)),
    ),
    "dynamic_rope": Refused(
        UNSUPPORTED,
        ("'dynamic'", "largest position", "yarn"),
        partial(build_model, "llama", rope_parameters=DYNAMIC),
    ),
    "unnumbered": Refused(
        UNSUPPORTED, ("no position_ids", "from 0", '"positions"'), partial(Unnumbered, LlamaConfig(**NARROW))
    ),
    "own_loss": Refused(UNSUPPORTED, ("loss_function", "whole logits"), with_own_loss),
    "too_few_heads": Refused(
        CONFIG,
        ("ulysses", "size=2", "heads=1"),
        partial(build_model, "llama", num_attention_heads=1, num_key_value_heads=1),
        method="ulysses",
    ),
    "softcap": Refused(
        UNSUPPORTED,
        ("softcap", "Gemma2Attention", "bends the scores"),
        SOFT_CAPPED,
        call={"use_cache": False},
        section={"unverified_model": True},
    ),
    "unverified": Refused(
        UNSUPPORTED,
        ("Gemma2ForCausalLM", "was refused (softcap", "verify-model", '"unverified_model": true'),
        SOFT_CAPPED,
    ),
    "labels_shifted_twice": Refused(
        CONFIG,
        ("LlamaForCausalLM shifts its labels itself", '"gather_output": 1'),
        section={
            **{"batch": {"input_ids": 1, "labels": 1}, "attention": ["model.layers.*.self_attn"]},
            "loss": {"labels": "labels"},
        },
    ),
    "cache": Refused(UNSUPPORTED, ("use_cache", "call the model's generate"), call={"use_cache": True}),
    "prefix_tuning": Refused(
        UNSUPPORTED,
        ("'PREFIX_TUNING'", "into a cache", '"PROMPT_TUNING"'),
        adapted("PrefixTuningConfig", num_virtual_tokens=2),
    ),
    "context_tuning": Refused(
        UNSUPPORTED,
        ("'CPT'", "from whole logits"),
        adapted("CPTConfig", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 4]),
    ),
    "activated_lora": Refused(
        UNSUPPORTED, ("alora_invocation_tokens", "Use LoRA"), adapted("LoraConfig", alora_invocation_tokens=[3, 4])
    ),
    "adaptive_ranks": Refused(UNSUPPORTED, ("'ADALORA'", "gradients"), adapted("AdaLoraConfig", total_step=4)),
    "unknown_adapter": Refused(
        UNSUPPORTED,
        ("SHIRA", "not compared", '"unverified_model": true'),
        adapted("ShiraConfig", target_modules=["q_proj"], r=2),
    ),
    "hidden_states": Refused(
        UNSUPPORTED, ("output_hidden_states", "set it to false"), call={"output_hidden_states": True}
    ),
    "last_logits": Refused(UNSUPPORTED, ("logits_to_keep", "leave it out"), call={"logits_to_keep": 1}),
    "unknown_tensor": Refused(
        UNSUPPORTED, ("token_type_ids", "(2, 13)", "Leave it out"), call={"token_type_ids": mask()}
    ),
    "padding_that_counts": Refused(
        CONFIG,
        ("2 of 2 * 13 are padding", "predicted at padding behind a token", "labels of -100"),
        call={"attention_mask": mask(slice(-2, None))},
    ),
    "padding_within_that_counts": Refused(
        CONFIG, ("3 of 2 * 13", "first token behind padding"), call={"attention_mask": mask(slice(5, 8))}
    ),
    "dense_mask": Refused(
        UNSUPPORTED, ("(2, 1, 13, 13)", "dense mask"), call={"attention_mask": torch.ones(MICRO, 1, LENGTH, LENGTH)}
    ),
    "documents_told_twice": Refused(
        CONFIG,
        ("position_ids and seq_idx", "start again in the middle"),
        call={"position_ids": positions((6, 7), (5, 8)), "seq_idx": mask()},
    ),
    "tiled_head_of_adapters": Refused(
        UNSUPPORTED,
        ("memory.tile_tokens", "an nn.Linear; adapters on a head", '"tile_tokens": null'),
        adapted("LoraConfig", target_modules=["lm_head", "q_proj"]),
        section=TILES,
    ),
    "tiled_head_of_no_lm": Refused(
        UNSUPPORTED,
        ("memory.tile_tokens", "LlamaForSequenceClassification", "no causal language model"),
        partial(LlamaForSequenceClassification, LlamaConfig(**NARROW, pad_token_id=0)),
        section=TILES,
    ),
    "tiled_head_of_unknown_logits": Refused(
        UNSUPPORTED,
        ("memory.tile_tokens='getitem'", "forward of PenalizedForCausalLM", '"tile_tokens": null'),
        partial(PenalizedForCausalLM, LlamaConfig(**NARROW)),
        call={"use_cache": False},
        section={**TILES, "unverified_model": True},
    ),
    "tiled_head_by_hand": Refused(
        UNSUPPORTED,
        ("memory.tile_tokens", "without a call of its head"),
        partial(ByHandForCausalLM, LlamaConfig(**NARROW)),
        call={"use_cache": False},
        section={**TILES, "unverified_model": True},
    ),
    "tiled_head_with_a_hook": Refused(
        UNSUPPORTED,
        ("memory.tile_tokens", "a forward hook of hf_refused", "a loss in place of logits"),
        hooked_head,
        call={"use_cache": False},
        section=TILES,
    ),
    "local_labels": Refused(CONFIG, ("labels=(2, 7)", "[2, 13]", "whole"), call={"labels": mask()[:, :7]}),
    "local_positions": Refused(CONFIG, ("position_ids=(1, 7)", "[2, 13]"), call={"position_ids": positions((7,))}),
    "no_tokens": Refused(CONFIG, ("input_ids", "inputs_embeds"), call={"input_ids": None}),
}


def attempt(refused: Refused) -> dict[str, Any]:
    """The exception on this rank."""
    torch.manual_seed(0)
    at = "initialize"
    try:
        engine = start(refused.model(), refused.method, **refused.section)
        at = "forward"
        if refused.call:
            engine(**{**micro_batch("tokens", 0, 0, 0), **refused.call})
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "at": at, "still_usable": _all_ranks_here()}
    return {"error": "", "message": "", "at": at, "still_usable": True}


def _all_ranks_here() -> bool:
    """A collective after the refusal: it completes only if no rank is left inside another one."""
    total = torch.ones(())
    dist.all_reduce(total)
    return total.item() == dist.get_world_size()


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """All refusals by name."""
    return {f"refused_{name}": partial(attempt, refused) for name, refused in REFUSED.items()}
