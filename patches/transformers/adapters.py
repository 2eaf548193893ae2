"""Which of PEFT's adapters compute token by token, so that each rank may do so for the tokens that it holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

# Compared with the unsharded run. Those of layers change weights, or features of a token; those of prompts embed
# virtual tokens in front of the sequence before the model gets it.
KNOWN = (
    *("LORA", "IA3", "LOHA", "LOKR", "OFT", "VERA", "HRA", "LN_TUNING", "TRAINABLE_TOKENS"),
    *("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING"),
)
_OTHER = 'adapt layers ("LORA" and the like) or the prompt ("PROMPT_TUNING", "P_TUNING"), or remove the section'
REFUSED = {
    "PREFIX_TUNING": "it puts keys and values of every layer into a cache, in front of those of the sequence, of which "
    "a rank holds a part",
    "CARTRIDGE": "it puts keys and values of every layer into a cache, in front of those of the sequence, of which a "
    "rank holds a part",
    "CPT": "it weighs the loss of every token from whole logits, and beside labels a rank has those of its own tokens",
    "XLORA": "it weighs its adapters by the hidden states of whole sequences, of which a rank holds a part",
    "ADALORA": "it takes ranks away by the gradients that this process finds, which are those of its own tokens",
}


def obstacles(module: nn.Module, model: nn.Module) -> Iterator[tuple[str, Any, str, str]]:
    """What it is, its value, why it stands in the way, and the remedy.

    Args:
        module: PEFT's wrapper, or the model.
        model: the model of Transformers.
    """
    for config in _configs(module, model):
        kind = _kind(config)
        if kind in REFUSED:
            yield "PEFT's peft_type", kind, REFUSED[kind], _OTHER
        if getattr(config, "alora_invocation_tokens", None) is not None:
            yield (
                "PEFT's alora_invocation_tokens",
                config.alora_invocation_tokens,
                "it counts tokens from the end of the sequence, of which a rank holds a part",
                "use LoRA without it, or remove the section",
            )


def unknown(module: nn.Module, model: nn.Module) -> str | None:
    """Why nobody knows whether the adapters are exact when the model is sharded; None where they are known to be."""
    kinds = sorted({_kind(config) for config in _configs(module, model)} - {*KNOWN, *REFUSED})
    if not kinds:
        return None
    return f"adapters of {', '.join(kinds)} were not compared with the unsharded model, as {', '.join(KNOWN)} were"


def _configs(module: nn.Module, model: nn.Module) -> Iterator[Any]:
    """Those of all adapters: of a wrapper, or of a model that has adapters of its own."""
    seen = set()
    for holder in (module, model):
        found = getattr(holder, "peft_config", None)
        for config in found.values() if isinstance(found, dict) else ():
            if id(config) not in seen:
                seen.add(id(config))
                yield config


def _kind(config: Any) -> str:
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind))
