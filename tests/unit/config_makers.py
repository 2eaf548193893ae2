"""Configs in one call, from each source, and what most of them share."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from dsp_plugin import SequenceParallelConfig

Config = SequenceParallelConfig
BATCH = {"batch": {"input_ids": 1, "labels": 1}, "attention": ["layers.*.attn"]}


def ulysses(**further: Any) -> Config:
    return Config(**{"method": "ulysses", "size": 2, **further})


def dsp(**further: Any) -> Config:
    return Config(**{"method": "dsp", "size": 2, **further})


def lasp(**further: Any) -> Config:
    return Config(**{"method": "lasp", "size": 4, **further})


def deepspeed(section: Any, **further: Any) -> Any:
    return Config.from_deepspeed({"train_batch_size": 8, "sequence_parallel": section, **further})


def megatron(**flags: Any) -> Any:
    return Config.from_megatron(Namespace(**flags))
