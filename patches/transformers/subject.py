"""A causal language model of Transformers by its config: `hf:llama-8b`, `hf:config.json`, `hf:FOLDER`."""

from __future__ import annotations

import inspect
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsp_plugin.errors import SequenceParallelConfigError


def subject(
    config: str, length: int = 4096, batch: int = 1, checkpointing: int = 1
) -> tuple[nn.Module, dict[str, Any]]:
    """The model with random weights in torch's default dtype, and one batch with labels.

    Args:
        config: a ``config.json``, the folder of one, or a name in `shipped`. Weights are not read.
        length: L, tokens of a sequence, whole.
        batch: sequences.
        checkpointing: 1 for Transformers' own activation checkpointing, of every layer; 0 for none.

    Raises:
        SequenceParallelConfigError: there is no such config, or Transformers builds no causal language model of it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = _path(config)
    try:
        read = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        text = read.get_text_config(decoder=True)
        if (getattr(text, "max_position_embeddings", None) or length) < length:
            text.max_position_embeddings = length
        model = AutoModelForCausalLM.from_config(read, dtype=torch.get_default_dtype(), trust_remote_code=False)
        if checkpointing:
            checkpointed(model)
    except (ValueError, OSError, KeyError, ImportError) as error:
        told = " ".join(str(error).split())[:300]
        raise SequenceParallelConfigError(
            setting="--model",
            value=f"hf:{config}",
            why=f"Transformers builds no causal language model of it: {told}",
            remedy="name the config.json of a model whose code is in Transformers",
        ) from error
    ids = torch.randint(text.vocab_size, (batch, length))
    return model, {"input_ids": ids, "labels": ids.clone(), "use_cache": False}


def shipped() -> list[str]:
    """The models whose shapes come with the library."""
    return sorted(entry.name.removesuffix(".json") for entry in _shapes().iterdir() if entry.name.endswith(".json"))


def checkpointed(model: Any) -> None:
    """Turn on Transformers' activation checkpointing, which has another name since 5.24."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    (setting,) = (name for name in inspect.signature(enable).parameters if name.endswith("checkpointing_kwargs"))
    enable(**{setting: {"use_reentrant": False}})


def _path(config: str) -> Path:
    for path in (Path(config), Path(str(_shapes() / f"{config}.json"))):
        if path.is_file() or (path / "config.json").is_file():
            return path
    raise SequenceParallelConfigError(
        setting="--model",
        value=f"hf:{config}",
        why="it is no config.json, no folder with one, and no model whose shapes come with the library; nothing is "
        "downloaded",
        remedy=f"name one of {', '.join(shipped())}, or the config.json of a model: huggingface-cli download NAME "
        "config.json",
    )


def _shapes() -> Any:
    return files("dsp_plugin.configs") / "shapes"
