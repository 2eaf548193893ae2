"""Checkpoints of an engine with a ``"sequence_parallel"`` section: what is recorded, checked, and never run.

Weights and optimizer states depend neither on the method nor on its size, and DeepSpeed's files know of neither. ZeRO's
optimizer shards depend on the number of ranks, which only DeepSpeed's universal format can change.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import DamagedCheckpointError, SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.patches import safe_load
from dsp_plugin.patches.deepspeed.choice import LATEST, Choice
from dsp_plugin.patches.deepspeed.engine import CONFIG, GROUPS
from dsp_plugin.training import checkpoint

logger = logging.getLogger(__name__)

UNIVERSAL = (
    "start with the same number of ranks, or convert the checkpoint with `python -m deepspeed.checkpoint."
    "ds_to_universal --input_folder FOLDER/TAG --output_folder FOLDER/TAG_universal --inject_missing_state` and set "
    '"checkpoint": {"load_universal": true}'
)


def checking(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``DeepSpeedEngine.load_checkpoint``.

    The replacement raises, on every rank and before anything is read:
        SequenceParallelConfigError: ZeRO's optimizer shards are those of another number of ranks.
        DamagedCheckpointError: a file is cut, missing or not the one that was saved. Where no tag is given, an earlier
            checkpoint that is whole is loaded instead.
    and when it reads it:
        DamagedCheckpointError: torch cannot make sense of a file.
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
        given = call.arguments
        universal, zero3 = self.load_universal_checkpoint(), self.zero_optimization_partition_weights()
        if zero3 and given["load_module_only"] and not universal:
            # ZeRO 3 has the weights in the optimizer's shards. DeepSpeed looks for them there only if told so.
            given["load_optimizer_states"] = False
        states = given["load_optimizer_states"] and not given["load_module_only"]
        consolidates = zero3 and not given["load_optimizer_states"]
        judge = functools.partial(_judge, self, config, Path(given["load_dir"]), states)
        choice = Choice(self, Path(given["load_dir"]), states, states or consolidates, judge)
        given["tag"] = choice.tag(given["tag"])
        if given["tag"] is None:
            return _nothing_there(self, given["load_dir"])
        source = None if universal else given["tag"]
        with safe_load.only(_classes()), _naming_files(self.checkpoint_engine), _consolidating(source):
            found = upstream(*call.args, **call.kwargs)
            if found[0] is not None and universal:
                _restore_buffers(self.module, Path(found[0]).parent)
        if found[0] is not None:
            # DeepSpeed counts micro steps from 0 again; what forwards draw at random is keyed by them.
            self.micro_steps = self.global_steps * self.gradient_accumulation_steps()
        return found

    return load_checkpoint


@contextmanager
def _consolidating(tag: str | None) -> Iterator[None]:
    """Weights of ZeRO 3 that DeepSpeed puts together in the block are this tag's; None for what ``latest`` names."""
    from deepspeed.runtime import engine

    upstream = engine.get_fp32_state_dict_from_zero_checkpoint
    engine.get_fp32_state_dict_from_zero_checkpoint = functools.partial(upstream, tag=tag)
    try:
        yield
    finally:
        engine.get_fp32_state_dict_from_zero_checkpoint = upstream


def _judge(engine: Any, config: SequenceParallelConfig, root: Path, states: bool, tag: str) -> None:
    """Raises SequenceParallelConfigError if what was recorded of a tag does not go with this run; logs what changed."""
    recorded = checkpoint.read(root / tag)
    if recorded is None:
        return
    # A file of weights for each stage and tensor-parallel rank, at any ZeRO stage.
    by_world = states and engine.zero_optimization()
    fixed = () if engine.load_universal_checkpoint() else ("model", "world") if by_world else ("model",)
    notes = checkpoint.check(recorded, config, "deepspeed", sizes(engine), fixed=fixed, remedy=UNIVERSAL)
    if notes:
        logger.warning("checkpoint %s was written by another setup: %s", root / tag, "; ".join(notes))


def _nothing_there(engine: Any, root: Any) -> tuple[None, None]:
    """As DeepSpeed has it where ``latest`` is missing, but the same on every rank: the first one's word holds."""
    if engine.load_universal_checkpoint():
        raise SequenceParallelConfigError(
            setting="load_universal",
            value=True,
            why=f"{Path(root) / LATEST}_universal does not exist",
            remedy=f"convert a checkpoint there first: {UNIVERSAL}",
        )
    if dist.get_rank() == 0:
        logger.warning("no checkpoint is loaded: %s does not exist", Path(root) / LATEST)
    return None, None


@contextmanager
def _naming_files(reader: Any) -> Iterator[None]:
    """Where torch cannot read a file in the block, the error says which, and that a new start will not help."""
    upstream = reader.load

    @functools.wraps(upstream)
    def load(path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return upstream(path, *args, **kwargs)
        except (EOFError, RuntimeError) as error:
            # Such as a refusal of `safe_load`, or memory that has run out.
            if not isinstance(error, EOFError) and type(error) is not RuntimeError:
                raise
            raise DamagedCheckpointError(
                f"{path} cannot be read: {error}. Restore the file, or go on from another checkpoint: "
                "load_checkpoint(..., tag=...)."
            ) from error

    reader.load = load
    try:
        yield
    finally:
        del reader.load


def _restore_buffers(module: nn.Module, folder: Path) -> None:
    """Loads what DeepSpeed's universal format leaves out: its files of parameters are loaded, those of buffers not."""
    states = torch.load(min(folder.glob("*model_states.pt")), map_location="cpu")["module"]
    for name, buffer in module.named_buffers():
        if name in states:
            buffer.copy_(states[name])


def sizes(engine: Any) -> dict[str, int]:
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
