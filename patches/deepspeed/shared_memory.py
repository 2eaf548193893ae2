"""The shared memory of DeepSpeed's all-reduce on CPU, which exists where LOCAL_SIZE is the size of the world.

DeepSpeed names each rank's segment after MASTER_ADDR and MASTER_PORT and never removes the name: 69 MB of memory a rank
stay behind after every run, and ranks that torchrun starts again under the same port find the segments of the dead and
wait for them for ever. Once every rank has mapped every segment the names have no use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch.distributed as dist

FOLDER = Path("/dev/shm")


def unnaming(upstream: Callable[..., None]) -> Callable[..., None]:
    """`TorchBackend.__init__`, which maps the segments, and then removes this rank's name."""

    @wraps(upstream)
    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        upstream(self, *args, **kwargs)
        if self.shm_comm_op is None or os.environ.get("LOCAL_SIZE") != str(dist.get_world_size()):
            return
        dist.barrier()
        segment(os.environ, dist.get_rank()).unlink(missing_ok=True)

    return initialize


def segment(environment: Any, rank: int) -> Path:
    """The file behind a rank's segment, by DeepSpeed's rule (csrc/cpu/comm/shm.cpp, `shm_initialize`)."""
    address, port = (environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return FOLDER / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
