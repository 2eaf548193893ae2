"""What else scripts do with a model under DeepSpeed, in a world of 2 that shares one sequence."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import deepspeed
import torch
from hf_cases import METHODS, Case
from hf_models import FAMILIES, SHAPE, build_model, micro_batch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsp_plugin import ledger


def start(model: PreTrainedModel, method: str = "ring", zero: int = 0, **section: Any) -> Any:
    """An engine around the model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=Case("", method, 2, zero, extra=tuple(section.items())).config()
    )
    return engine


def logits_of_shards() -> dict[str, Any]:
    """Whole where they are read, and those of the rank's tokens where the section says so and there are labels."""
    torch.manual_seed(0)
    engine = start(build_model("llama"))
    batch = micro_batch("tokens", 0, 0, 0)
    with ledger() as log:
        unread = engine(**batch)
        unread.loss.item()
        before = log.bytes()
        read = unread.logits
        after = log.bytes()
    torch.manual_seed(0)
    engine = start(build_model("llama"), logits="local")
    local = engine(**batch)
    whole = engine(input_ids=batch["input_ids"]).logits
    engine.eval()
    with torch.no_grad():
        evaluated = engine(**batch)
        as_tuple = engine(**batch, return_dict=False)
    return {
        "local": local.logits.tolist(),
        "read": read.tolist(),
        "gathered": after - before,
        "whole": whole.tolist(),
        "losses": [local.loss.item(), evaluated.loss.item(), as_tuple[0].item()],
        "cache": evaluated.past_key_values is not None,
    }


def attention_dropout() -> dict[str, Any]:
    """Two losses each, the second of which shows the gradients of the first: by method, and with recomputation."""
    losses = {}
    for name, method, checkpointing, zero, rate in (
        *((method, method, "", 0, 0.5) for method in METHODS),
        ("plain", "ring", "plain", 0, 0.5),
        ("reentrant", "usp", "reentrant", 3, 0.5),
        ("none", "ring", "", 0, 0.0),
    ):
        torch.manual_seed(0)
        engine = start(build_model("llama", checkpointing, attention_dropout=rate), method, zero)
        losses[name] = []
        for step in range(2):
            loss = engine(**micro_batch("tokens", step, 0, 0)).loss
            engine.backward(loss)
            engine.step()
            losses[name].append(loss.item())
    return losses


def two_lengths() -> dict[str, Any]:
    """Two forward passes of different lengths before the backward passes of both, with layers recomputed."""
    found = {}
    for checkpointing in ("", "plain", "reentrant"):
        torch.manual_seed(0)
        model = build_model("qwen2", checkpointing)
        engine = start(model)
        first = engine(**micro_batch("tokens", 0, 0, 0)).loss
        second = engine(**micro_batch("short", 0, 0, 0)).loss
        engine.backward(first + second)
        found[checkpointing or "kept"] = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    return found


def neighbours() -> dict[str, Any]:
    """A second model of the same config object stays as it is, and so does the model once an engine lets go of it."""
    kind, config, shape = FAMILIES["llama"]
    shared = config(**{**SHAPE, **shape})
    torch.manual_seed(0)
    model, other = kind(shared), kind(shared)
    names = set(ALL_ATTENTION_FUNCTIONS)
    batch = micro_batch("tokens", 0, 0, 0)
    before = [network(**batch).loss.item() for network in (model, other)]
    start(model)
    sharded = set(ALL_ATTENTION_FUNCTIONS) - names
    saved = model.config.to_json_string()
    after = other(**batch).loss.item()
    copied = deepcopy(other.config)
    again = start(model, "ulysses")
    under_another = again(**batch).loss.item()
    for undo in reversed(vars(model).pop("_sequence_parallel_undo")):
        undo()
    return {
        "before": before,
        "other": after,
        "again": under_another,
        "alone": model(**batch).loss.item(),
        "names": sorted(sharded),
        "left": sorted(set(ALL_ATTENTION_FUNCTIONS) - names),
        "implementations": [
            shared._attn_implementation,
            copied._attn_implementation,
            model.config._attn_implementation,
        ],
        "saved": saved,
    }


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """All of them by name."""
    return {
        "logits": logits_of_shards,
        "dropout": attention_dropout,
        "two_lengths": two_lengths,
        "neighbours": neighbours,
    }
