"""Checkpoints of an engine with a ``"sequence_parallel"`` section: what is recorded, checked, and never run.

Weights and optimizer states depend neither on the method nor on its size, and DeepSpeed's files know of neither. ZeRO's
optimizer shards depend on the number of ranks, which only DeepSpeed's universal format can change.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.patches import safe_load
from dsp_plugin.patches.deepspeed.engine import CONFIG, GROUPS
from dsp_plugin.training import checkpoint

logger = logging.getLogger(__name__)

UNIVERSAL = (
    "start with the same number of ranks, or convert the checkpoint with `python -m deepspeed.checkpoint."
    "ds_to_universal --input_folder FOLDER/TAG --output_folder FOLDER/TAG_universal --inject_missing_state` and set "
    '"checkpoint": {"load_universal": true}'
)


def recording(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``DeepSpeedEngine.save_checkpoint``: the first rank also writes our record.

    It is there before DeepSpeed's own files and long before ``latest`` names them.
    """
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        config: SequenceParallelConfig | None = vars(self).get(CONFIG)
        if config is not None and dist.get_rank() == 0 and given["save_dir"]:
            tag = given.get("tag") or f"global_step{self.global_steps}"
            folder = Path(given["save_dir"]) / str(tag)
            checkpoint.write(folder, checkpoint.record(config, "deepspeed", _sizes(self)))
        return upstream(self, *args, **kwargs)

    return save_checkpoint


def checking(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``DeepSpeedEngine.load_checkpoint``.

    The replacement raises, on every rank and before anything is read:
        SequenceParallelConfigError: ZeRO's optimizer shards are those of another number of ranks.
        UnsupportedError: a file holds more than tensors, plain values and DeepSpeed's own records.
    """
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def load_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        config: SequenceParallelConfig | None = vars(self).get(CONFIG)
        if config is None:
            return upstream(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        _check(self, config, call.arguments)
        with safe_load.only(_classes()):
            found = upstream(self, *args, **kwargs)
            if found[0] is not None and self.load_universal_checkpoint():
                _restore_buffers(self.module, Path(found[0]).parent)
        if found[0] is not None:
            # DeepSpeed counts micro steps from 0 again; what forwards draw at random is keyed by them.
            self.micro_steps = self.global_steps * self.gradient_accumulation_steps()
        return found

    return load_checkpoint


def _check(engine: Any, config: SequenceParallelConfig, given: dict[str, Any]) -> None:
    universal = engine.load_universal_checkpoint()
    folder, tag = Path(given["load_dir"]), given["tag"]
    if tag is None:
        latest = folder / ("latest_universal" if universal else "latest")
        if not latest.is_file():
            return
        tag = latest.read_text().strip()
    recorded = checkpoint.read(folder / str(tag))
    if recorded is None:
        return
    shards = engine.zero_optimization() and given["load_optimizer_states"] and not given["load_module_only"]
    # A file of weights for each stage and tensor-parallel rank, at any ZeRO stage.
    fixed = () if universal else ("model", "world") if shards else ("model",)
    notes = checkpoint.check(recorded, config, "deepspeed", _sizes(engine), fixed=fixed, remedy=UNIVERSAL)
    if notes and dist.get_rank() == 0:
        logger.warning("checkpoint %s was written by another setup: %s", folder / str(tag), "; ".join(notes))


def _restore_buffers(module: nn.Module, folder: Path) -> None:
    """Loads what DeepSpeed's universal format leaves out: its files of parameters are loaded, those of buffers not."""
    states = torch.load(min(folder.glob("*model_states.pt")), map_location="cpu")["module"]
    for name, buffer in module.named_buffers():
        if name in states:
            buffer.copy_(states[name])


def _sizes(engine: Any) -> dict[str, int]:
    """Ranks by axis; ``model`` is what pipeline stages and tensor parallelism make together."""
    groups: SequenceParallelGroups = vars(engine)[GROUPS]
    world, dp, sp = dist.get_world_size(), groups.dp.size, groups.sp.size
    return {"world": world, "model": world // (dp * sp), "dp": dp, "sp": sp}


def _classes() -> list[Any]:
    """What DeepSpeed's own files hold beside tensors and plain values."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
