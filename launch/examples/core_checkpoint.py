"""Checkpoints of `core_training`: weights, optimizer, losses and with their number the place in the data.

Megatron's distributed checkpoints hold whole tensors, so a run goes on with any tensor, pipeline, context and data
parallel sizes. One is a folder ``step-NNNNNN``, which gets that name when all of it is written: a run that is killed
while it saves leaves the one before as the last.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel

# Each state as one tensor of its parameter's shape. The other types store what one choice of sizes makes of it.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
NAME = re.compile(r"step-(\d{6,})")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to save to and what to load."""
    parser.add_argument("--checkpoint", type=Path, help="go on from the last checkpoint in this folder, if it has one")
    parser.add_argument("--save-every", type=int, default=0, help="save a checkpoint there every so many steps")
    parser.add_argument("--save", type=Path, help="folder for a distributed checkpoint of the trained weights")
    parser.add_argument("--load", type=Path, help="folder of one to start from, saved at any parallel sizes")


def sharded_weights(chunks: list[DistributedDataParallel]) -> dict[str, Any]:
    """What Megatron's distributed checkpoints take: which part of each whole weight this rank holds."""
    return {f"model{stage}": chunk.module.sharded_state_dict() for stage, chunk in enumerate(chunks)}


def save_weights(chunks: list[DistributedDataParallel], folder: Path) -> None:
    """Saves the weights alone."""
    folder.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(sharded_weights(chunks), str(folder))


def load_weights(chunks: list[DistributedDataParallel], folder: Path) -> None:
    """Loads this rank's part of a checkpoint, in place."""
    _set_weights(chunks, dist_checkpointing.load(sharded_weights(chunks), str(folder)))


def save(folder: Path, chunks: list[DistributedDataParallel], optimizer: Any, losses: list[float]) -> None:
    """Saves a training run after `losses` steps under `folder`; every rank calls it.

    Args:
        losses: one for each step so far, 0 on ranks that do not know it.
    """
    known = torch.tensor(losses, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(known, op=dist.ReduceOp.MAX)
    whole = folder / f"step-{len(losses):06d}"
    partial = folder / f".{whole.name}"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    weights = sharded_weights(chunks)
    content = {
        **weights,
        "optimizer": optimizer.sharded_state_dict(weights, metadata=METADATA),
        "losses": known.tolist(),
    }
    dist_checkpointing.save(content, str(partial), content_metadata=METADATA)
    if dist.get_rank() == 0:
        os.replace(partial, whole)
    dist.barrier()


def resume(folder: Path, chunks: list[DistributedDataParallel], optimizer: Any) -> list[float]:
    """Loads the last checkpoint under `folder` in place, if there is one.

    Returns:
        The losses of the steps before it, which the run goes on after.
    """
    last = [_last(folder)] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(last, src=0, device=torch.device("cuda", torch.cuda.current_device()))
    if last[0] is None:
        return []
    weights = sharded_weights(chunks)
    wanted = {**weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=True, metadata=METADATA)}
    content = dist_checkpointing.load(wanted, str(last[0]))
    _set_weights(chunks, content)
    optimizer.load_state_dict(content["optimizer"])
    if dist.get_rank() == 0:
        print(f"going on after step {len(content['losses'])} of {folder}", flush=True)
    return list(content["losses"])


def _set_weights(chunks: list[DistributedDataParallel], content: dict[str, Any]) -> None:
    for stage, chunk in enumerate(chunks):
        chunk.module.load_state_dict(content[f"model{stage}"])


def _last(folder: Path) -> Path | None:
    steps = {int(found[1]): path for path in folder.glob("step-*") if (found := NAME.fullmatch(path.name))}
    return steps[max(steps)] if steps else None
