"""What a user pastes to have an arrangement: the sections of a DeepSpeed config, or Megatron's flags."""

from __future__ import annotations

import json
from typing import Any

from dsp_plugin.config.memory import Bytes, MemoryConfig
from dsp_plugin.config.section_names import DEEPSPEED_SECTION
from dsp_plugin.planner.arrangement import Arrangement

_MIB = 1 << 20


def sections(how: Arrangement) -> dict[str, Any]:
    """Of a DeepSpeed config; activation checkpointing is the model's own, see `remark`."""
    section: dict[str, Any] = {"method": how.method, "size": how.size}
    if how.method == "usp":
        section |= {"ulysses_size": how.ulysses, "ring_size": how.ring}
    if how.recompute == "keep_attention":
        section["recompute"] = how.recompute
    if memory := memory_section(how.memory):
        section["memory"] = memory
    found: dict[str, Any] = {DEEPSPEED_SECTION: section, "zero_optimization": {"stage": how.stage}}
    if how.tensor > 1:
        found["tensor_parallel"] = {"autotp_size": how.tensor}
    return {**found, "bf16": {"enabled": True}, "gradient_accumulation_steps": how.micro_batches}


def flags(how: Arrangement, length: int) -> list[str]:
    """Of a Megatron command line, for ``python -m dsp_plugin.launch``."""
    found = [
        f"--tensor-model-parallel-size {how.tensor}",
        f"--pipeline-model-parallel-size {how.pipeline}",
        f"--context-parallel-size {how.size}",
        f"--seq-length {length}",
        "--bf16",
    ]
    if how.tensor > 1:
        found.append("--sequence-parallel")
    if how.stage:
        found.append("--use-distributed-optimizer")
    if how.recompute != "none":
        found.append("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    if how.size > 1:
        found.append(f"--sp-method {how.method}")
        if how.method == "usp":
            found.append(f"--sp-ulysses-size {how.ulysses} --sp-ring-size {how.ring}")
        if how.recompute == "keep_attention":
            found.append("--sp-recompute keep_attention")
        if memory := memory_section(how.memory):
            found.append(f"--sp-memory '{json.dumps(memory)}'")
    return found


def memory_section(memory: MemoryConfig) -> dict[str, Any]:
    """As JSON has it; what is off is left out."""
    given = {name: getattr(memory, name) for name in MemoryConfig.model_fields if name in memory.model_fields_set}
    return {name: _amount(value) if isinstance(value, Bytes) else value for name, value in given.items()}


def remark(how: Arrangement) -> str:
    """What the section cannot say."""
    if how.framework == "megatron":
        return ""
    if how.recompute == "none":
        return "Without activation checkpointing: leave model.gradient_checkpointing_enable() out."
    return "With activation checkpointing of every layer: call model.gradient_checkpointing_enable()."


def _amount(value: Bytes) -> str:
    return f"{value // _MIB}MiB" if value % _MIB == 0 else f"{int(value)}B"
