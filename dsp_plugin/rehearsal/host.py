"""Host memory in a rehearsal: checkpoints that are offloaded leave what counts as the device, be they real or fake."""

from __future__ import annotations

import torch
from torch import Tensor

from dsp_plugin.config.memory import Bytes
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.rehearsal.memory import AllocatorLog, StorageTracker
from dsp_plugin.training.host_copies import FLOOR, Copies, Copy
from dsp_plugin.training.offload import Offload


class HostBuffers:
    """Copies to buffers that count as the host's, and back, which are done at once.

    Args:
        log: is told of every buffer.
    """

    moves, page, floor = True, 1, FLOOR

    def __init__(self, log: StorageTracker | AllocatorLog) -> None:
        self._log = log

    def buffer(self, nbytes: int) -> Tensor:
        """[nbytes], uint8."""
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        self._log.move_to_host(buffer)
        return buffer

    def start(self, source: Tensor, target: Tensor) -> Copy:
        """Copy; returns what need not be waited for."""
        target.copy_(source, non_blocking=True)
        return self

    def join(self) -> None:
        """It is done."""

    def free_bytes(self) -> int | None:
        """Nobody knows: a device that does not exist falls short of nothing."""
        return None


def offload_of(config: SequenceParallelConfig) -> Offload | None:
    """What serves the config in a rehearsal, whatever this machine has of host memory; None for nothing."""
    if config.offload is False or config.offload == "auto":
        return None
    return Offload(int(config.offload) if isinstance(config.offload, Bytes) else None)


def watch(offload: Offload | None, config: SequenceParallelConfig, log: StorageTracker | AllocatorLog) -> None:
    """Have an offload move what it would only count, and tell ``log``."""
    if offload is None:
        return
    buffers: Copies = HostBuffers(log)

    def copies_of(_: Tensor) -> Copies | None:
        return buffers

    offload.copies = copies_of
    # A library has set it by what this machine has.
    offload.pool.limit = int(config.offload) if isinstance(config.offload, Bytes) else None
