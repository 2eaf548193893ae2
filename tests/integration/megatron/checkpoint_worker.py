"""Two ranks of Megatron-core that load checkpoints which were tampered with or do not fit, each in its own folder."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError

TRUST = "DSP_PLUGIN_TRUST_CHECKPOINT"


class Touch:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def content(**others: Any) -> dict[str, Any]:
    """A sharded tensor of two rows, a row a rank, and what is asked for."""
    rank = dist.get_rank()
    row = torch.full((1, 3), float(rank))
    return {"row": ShardedTensor.from_rank_offsets("row", row, (0, rank, 2)), **others}


def save(folder: Path, **others: Any) -> Path:
    """Saves `content`."""
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(content(**others), str(folder))
    return folder


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Sets a variable for the block."""
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def on_rank_0(action: Any, *arguments: Any) -> None:
    """Runs it there while the other waits."""
    dist.barrier()
    if dist.get_rank() == 0:
        action(*arguments)
    dist.barrier()


def check_common(folder: Path) -> None:
    """``common.pt``, where versions before 0.19 keep what is no tensor, and 0.19 reads it from if it is there."""
    touched = folder / "touched-by-common"
    saved = save(folder / "common", step=3)
    on_rank_0(torch.save, {"step": Touch(touched)}, saved / "common.pt")
    readers = [
        lambda: dist_checkpointing.load(content(), str(saved)),
        lambda: dist_checkpointing.load_common_state_dict(str(saved)),
        lambda: dist_checkpointing.load_content_metadata(str(saved)),
    ]
    for read in readers:
        with pytest.raises(UnsupportedError, match=r"system.*could run code.*DSP_PLUGIN_TRUST_CHECKPOINT=1"):
            read()
    assert not touched.exists()
    dist.barrier()
    with environment(TRUST, "1"):
        dist_checkpointing.load_common_state_dict(str(saved))
    assert touched.exists()


def check_objects(folder: Path) -> None:
    """Objects among the tensors, which torch.distributed.checkpoint unpickles without any restraint."""
    touched = folder / "touched-by-object"
    bomb = ShardedObject("bomb", Touch(touched), (1,), (0,), replica_id=dist.get_rank())
    saved = save(folder / "objects", bomb=bomb)
    wanted = ShardedObject("bomb", None, (1,), (0,), replica_id=dist.get_rank())
    with pytest.raises(UnsupportedError, match=r"system.*could run code"):
        dist_checkpointing.load(content(bomb=wanted), str(saved))
    assert not touched.exists()


def check_metadata(folder: Path) -> None:
    """``.metadata``, which is a pickle itself."""
    import pickle

    touched = folder / "touched-by-metadata"
    saved = save(folder / "metadata")
    on_rank_0((saved / ".metadata").write_bytes, pickle.dumps(Touch(touched)))
    with pytest.raises(UnsupportedError, match=r"system.*could run code.*DSP_PLUGIN_TRUST_CHECKPOINT=1"):
        dist_checkpointing.load(content(), str(saved))
    assert not touched.exists()


def check_record(folder: Path) -> None:
    """The record says how the run was parallelized, and a load of what cannot follow a change is refused."""
    saved = save(folder / "record", optimizer={"param_state_sharding_type": "dp_reshardable"})
    path = saved / "sequence_parallel.json"
    record = json.loads(path.read_text())
    assert record["sizes"] == {"world": 2, "tp": 1, "pp": 1, "dp": 1, "sp": 2}
    assert record["config"]["method"] == "ulysses"
    assert record["optimizer"] == "dp_reshardable"

    record["sizes"] |= {"tp": 4, "sp": 8}
    record["config"] |= {"method": "ring", "size": 8}
    on_rank_0(path.write_text, json.dumps(record))
    with pytest.raises(SequenceParallelConfigError, match=r"tp=.*1.*tp 4.*--dist-ckpt-optim-fully-reshardable"):
        dist_checkpointing.load(content(optimizer={"param_state_sharding_type": "dp_reshardable"}), str(saved))
    on_rank_0(path.write_text, json.dumps({**record, "sizes": {}}))
    for other in ({"state": {}}, {"param_state_sharding_type": "fully_reshardable"}):
        with pytest.raises(SequenceParallelConfigError, match=r"holds the optimizer's states in the form 'dp_resh"):
            dist_checkpointing.load(content(optimizer=other), str(saved))
    on_rank_0(path.write_text, json.dumps(record))
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda line: logged.append(line.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dsp_plugin.patches.megatron.checkpoint")
    logger.addHandler(handler)
    try:
        loaded = dist_checkpointing.load(content(), str(saved))
    finally:
        logger.removeHandler(handler)
    assert loaded["row"].tolist() == [[float(dist.get_rank())] * 3]
    if dist.get_rank() == 0:
        assert len(logged) == 1
        assert "sequence_parallel.method ring -> ulysses" in logged[0]
        assert "tp 4 -> 1" in logged[0]
    else:
        assert not logged

    on_rank_0(path.write_text, json.dumps({**record, "framework": "deepspeed"}))
    with pytest.raises(SequenceParallelConfigError, match="written by deepspeed"):
        dist_checkpointing.load(content(), str(saved))


def main() -> None:
    """All checks, in a world of two context-parallel ranks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context-parallel-size", type=int)
    args = parser.parse_args()
    folder = args.folder
    dist.init_process_group("nccl")
    parallel_state.initialize_model_parallel(context_parallel_size=args.context_parallel_size)
    for check in (check_common, check_objects, check_metadata, check_record):
        check(folder)
        dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
