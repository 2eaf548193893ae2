"""How much host memory checkpoints may take, and whether the machine has it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.consent import go_on
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.training.host_blocks import SETTING
from dsp_plugin.training.offload import Offload

_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def offload_for(setting: bool | int | Literal["auto"], axis: Axis) -> Offload | None:
    """What serves a run's setting ``memory.offload``; None for nothing.

    Args:
        setting: an amount in bytes is the most that this rank may take. True is its share of nine tenths of what the
            machine has free. ``"auto"`` is likewise, where there is a CUDA device and torch can, and see `Offload`.
        axis: ranks that hear of a refusal together. Collective, unless there is nothing to refuse.

    Raises:
        SequenceParallelConfigError: the machine has not what its ranks may take.
    """
    able = torch.cuda.is_available() and hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
    if setting is False or (setting == "auto" and not able):
        return None
    free, ranks = host_bytes_free(), local_ranks()
    share = None if free is None else free * 9 // 10 // ranks
    if isinstance(setting, bool) or not isinstance(setting, int):
        return Offload(share, auto=setting == "auto", axis=axis)
    refusal = None
    if free is not None and setting * ranks > free:
        refusal = SequenceParallelConfigError(
            setting=SETTING,
            value=f"{int(setting)} bytes",
            why=f"{ranks} rank{'s' if ranks > 1 else ''} on this machine may take {int(setting) * ranks} bytes of host "
            f"memory, and {free} are free",
            remedy=f"set it to {share} bytes or less, or to true for that",
        )
    go_on("checkpoints in host memory", refusal, axis)
    return Offload(int(setting), axis=axis)


def local_ranks() -> int:
    """Ranks on this machine, as launchers tell; 1 where none does."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 0:
            return int(value)
    return 1


def host_bytes_free(meminfo: Path = _MEMINFO, cgroup: Path = _CGROUP) -> int | None:
    """Bytes of host memory that may still be taken, as kernel and container say; None where neither does."""
    found = []
    with suppress(OSError, KeyError, ValueError, IndexError):
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):
        found.append(int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text()))
    return max(min(found), 0) if found else None
