"""`megatron.core.dist_checkpointing`: a record of the parallelism beside each checkpoint, and loads that run no code.

Weights and the states of most optimizers are stored by their place in the whole tensor, so they load at any sizes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.patches import safe_load
from dsp_plugin.patches.megatron import safe_metadata
from dsp_plugin.patches.megatron.parallel_state import registered_state
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch
from dsp_plugin.training import checkpoint

logger = logging.getLogger(__name__)

MODULE = "megatron.core.dist_checkpointing"
WHOLE = "whole"
_READERS = ("load_common_state_dict", "load_content_metadata", "load_plain_tensors", "load_tensors_metadata")
# Where the distributed optimizer's states are stored by their place in its buffers, which differ with these sizes.
_BY_BUFFER = ("dp_reshardable", "dp_zero_gather_scatter")
_BUFFER_SIZES = ("tp", "pp")


def patches() -> tuple[Patch, ...]:
    """Saving, loading, and every other function that reads a checkpoint."""

    def patch(name: str, make: Callable[[Any], object], *parameters: str) -> Patch:
        return Patch(f"megatron checkpoints: {name}", f"{MODULE}:{name}", DISTRIBUTION, SUPPORTED, make, parameters)

    return (
        patch("save", _save, "sharded_state_dict", "checkpoint_dir"),
        patch("load", _load, "sharded_state_dict", "checkpoint_dir"),
        *(patch(name, _read) for name in _READERS),
        safe_metadata.patch(),
    )


def _save(upstream: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def save(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        folder, record = _folder(call), _record(call["sharded_state_dict"])
        writes = folder is not None and dist.get_rank() == 0
        if writes:
            assert folder is not None
            # Not the record of what the folder held before, should this save not come to its end.
            (folder / checkpoint.FILE).unlink(missing_ok=True)
        result = upstream(*args, **kwargs)
        if writes:
            assert folder is not None
            checkpoint.write(folder, record)
        dist.barrier()
        return result

    return save


def _load(upstream: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def load(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs).arguments
        _check(_folder(call), call["sharded_state_dict"])
        with _running_no_code():
            return upstream(*args, **kwargs)

    return load


def _read(upstream: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(upstream)
    def read(*args: Any, **kwargs: Any) -> Any:
        with _running_no_code():
            return upstream(*args, **kwargs)

    return read


@contextlib.contextmanager
def _running_no_code() -> Iterator[None]:
    """Loads in the block read tensors, plain values and the classes that Megatron itself has declared safe."""
    try:
        with safe_load.only(()):
            yield
    except CheckpointException as error:
        # How torch.distributed.checkpoint passes on what was raised on any rank.
        for failure, _ in error.failures.values():
            if isinstance(failure, UnsupportedError):
                raise failure from None
            # What it meets while reading metadata, it quotes in an error of its own.
            _, quoted, refusal = str(failure).partition("metadata read failed: ")
            if quoted and refusal.startswith("checkpoint="):
                raise UnsupportedError(refusal) from None
        raise


def _check(folder: Path | None, sharded_state_dict: Mapping[str, Any]) -> None:
    """Logs what changed since the checkpoint was written.

    Raises:
        SequenceParallelConfigError: what is asked of it cannot be loaded at these sizes, or into this optimizer.
        UnsupportedError: the record is of an unknown format.
    """
    recorded = None if folder is None else checkpoint.read(folder)
    if recorded is None:
        return
    current = _record(sharded_state_dict)
    state = registered_state()
    held, wanted = recorded.get("optimizer"), current["optimizer"]
    notes = checkpoint.check(
        recorded,
        None if state is None else state.config,
        "megatron",
        current["sizes"],
        fixed=_BUFFER_SIZES if held in _BY_BUFFER and wanted is not None else (),
        remedy=f"save it with the distributed optimizer's sharding type 'fully_reshardable' in place of {held!r} "
        "(megatron.training: --dist-ckpt-optim-fully-reshardable), or load the weights alone (--no-load-optim)",
    )
    if held is not None and wanted is not None and held != wanted:
        raise SequenceParallelConfigError(
            setting="optimizer",
            value=wanted,
            why=f"{folder} holds the optimizer's states in the form {held!r}, where {WHOLE!r} is without the "
            "distributed optimizer and everything else is one of its sharding types",
            remedy="start with the optimizer and sharding type that saved it, or load the weights alone "
            "(--no-load-optim)",
        )
    if notes and dist.get_rank() == 0:
        logger.warning("checkpoint %s: changed since it was written: %s", folder, "; ".join(notes))


def _record(sharded_state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What `training.checkpoint` records, and how the optimizer's states are stored, None without an optimizer."""
    from megatron.core import parallel_state

    sizes = {"world": dist.get_world_size()}
    if parallel_state.model_parallel_is_initialized():
        sizes |= {
            "tp": parallel_state.get_tensor_model_parallel_world_size(),
            "pp": parallel_state.get_pipeline_model_parallel_world_size(),
            "dp": parallel_state.get_data_parallel_world_size(),
            "sp": parallel_state.get_context_parallel_world_size(),
        }
    state = registered_state()
    record = checkpoint.record(None if state is None else state.config, "megatron", sizes)
    return {**record, "optimizer": _optimizer_format(sharded_state_dict.get("optimizer"))}


def _optimizer_format(optimizer: Any) -> str | None:
    """`WHOLE`, or the distributed optimizer's sharding type; of the first where several are chained."""
    if not isinstance(optimizer, Mapping):
        return None
    candidates = [optimizer, *(part for part in optimizer.values() if isinstance(part, Mapping))]
    found = [part["param_state_sharding_type"] for part in candidates if "param_state_sharding_type" in part]
    return str(found[0]) if found else WHOLE


def _folder(call: Mapping[str, Any]) -> Path | None:
    """The checkpoint's folder; None on an object store, which has no record."""
    name = str(call["checkpoint_dir"])
    return None if "://" in name else Path(name)
