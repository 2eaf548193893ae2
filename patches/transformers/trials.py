"""What a causal language model is tried with beside the unsharded one: models, batches, and how they are sharded.

The families of the page and the user's own model go through the same trials.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.config.schema import DEEPSPEED_SECTION, SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.patches.transformers import serves, tiny
from dsp_plugin.patches.transformers.causal_lm import ShardedCausalLM
from dsp_plugin.patches.transformers.checks import checked_section

__all__ = [
    "FEATURES",
    "batches",
    "from_folder",
    "prepared",
    "prepared_or_why",
    "section_of",
    "serves",
    "shard",
    "tiny_copy",
]

# The features, each with what it is, in the order in which they are tried.
FEATURES = {
    "tokens": "three steps",
    "packed": "documents in a row, by positions that start again",
    "padded": "padding after the tokens",
    "recomputed": "gradient checkpointing",
    "embedded": "inputs_embeds in place of input_ids",
}
STEPS, ROWS, LENGTH = 3, 2, 23
DOCUMENTS = (9, 3, 11)
IGNORED, PADDED = -100, 5


def batches(model: Any, feature: str) -> list[dict[str, Any]]:
    """What the model's forward is called with, whole; labels unshifted."""
    return [_batch(model, feature, step) for step in range(STEPS if feature == "tokens" else 1)]


def prepared(model: Any, feature: str) -> Any:
    """A copy of the model that does what the feature asks of it."""
    model = deepcopy(model).train()
    if feature == "recomputed":
        with warnings.catch_warnings():
            # Transformers 5 has another name for it, Transformers 4 has not.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def shard(model: Any, groups: SequenceParallelGroups, section: Mapping[str, Any]) -> ShardedCausalLM:
    """As `deepspeed.initialize` does it for the section, but for the page of families, which these trials write."""
    return ShardedCausalLM(model, checked_section(model, {**section, "unverified_model": True}), groups)


def section_of(method: str, size: int) -> dict[str, Any]:
    """The section that names a method and a size."""
    section = {"method": method, "size": size}
    assert SequenceParallelConfig.from_deepspeed({DEEPSPEED_SECTION: section}) is not None
    return section


def _batch(model: Any, feature: str, step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    padding = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    tokens = _tokens(model.config.get_text_config(decoder=True).vocab_size, padding, generator)
    labels = tokens.clone()
    # A prompt: the ranks have unlike counts of labels, so a mean of their means is far off.
    labels[:, :4] = IGNORED
    batch: dict[str, Any] = {"input_ids": tokens, "labels": labels, "use_cache": False}
    if feature == "packed":
        batch["position_ids"] = torch.cat([torch.arange(length) for length in DOCUMENTS]).expand(ROWS, -1)
    if feature == "padded":
        batch["attention_mask"] = torch.ones_like(tokens)
        batch["attention_mask"][1, -PADDED:] = 0
        labels[1, -PADDED:] = IGNORED
        if padding is not None:
            tokens[1, -PADDED:] = padding
    if feature == "embedded":
        embedded = torch.randn(ROWS, LENGTH, model.get_input_embeddings().weight.shape[1], generator=generator)
        batch["inputs_embeds"] = embedded.double()
        del batch["input_ids"]
    return batch


def _tokens(vocabulary: int, padding: int | None, generator: torch.Generator) -> Tensor:
    """Of the vocabulary but its first few, which may have a meaning, and but padding, which some models look for."""
    known = torch.tensor([token for token in range(min(4, vocabulary - 1), vocabulary) if token != padding])
    return known[torch.randint(len(known), (ROWS, LENGTH), generator=generator)]


def from_folder(path: str, request: Any) -> Any:
    """The model of the config in a folder, tiny and random: weights are not read.

    Args:
        request: has ``trust_remote_code``.

    Raises:
        SequenceParallelConfigError: there is no config that Transformers can read, or it needs code that nobody trusts.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    trusted = request.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trusted)
        small = tiny.shrunk(config)
        if trusted and hasattr(config, "auto_map"):
            small.auto_map, small.name_or_path = config.auto_map, path
        model = tiny.random_model(partial(AutoModelForCausalLM.from_config, trust_remote_code=trusted), small)
    except (ValueError, OSError, KeyError) as error:
        told = " ".join(str(error).split())[:300]
        raise SequenceParallelConfigError(
            setting="model",
            value=path,
            why=f"Transformers builds no causal language model of it: {told}",
            remedy="name the folder of a config.json; for code beside it, say --trust-remote-code, which runs it",
        ) from error
    model._shrunk_from = config
    return model


def tiny_copy(model: Any) -> tuple[Any, dict[str, tuple[Any, Any]]]:
    """A tiny random model of the same class, and what was changed of the config."""
    config = vars(model).pop("_shrunk_from", None)
    if config is not None:
        return model, tiny.changed(config, model.config)
    small = tiny.shrunk(model.config)
    return tiny.random_model(type(model), small), tiny.changed(model.config, small)


def prepared_or_why(model: Any, feature: str) -> tuple[Any, str]:
    """`prepared`, or None and why the model cannot do it."""
    try:
        return prepared(model, feature), ""
    except ValueError as error:
        return None, str(error)
