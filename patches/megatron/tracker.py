"""`latest_checkpointed_iteration.txt`, which `megatron.training` writes in place, when all ranks have written theirs.

A run that is killed between the two halves of that write leaves it empty. Megatron's next start then says that the file
is invalid and exits with status 0, which torchrun and schedulers take for a run that has finished.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsp_plugin.errors import DamagedCheckpointError
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch
from dsp_plugin.training import durable
from dsp_plugin.training.agreed import on_first

_ITERATION = re.compile(r"iter_(\d{7,})")
_WRITTEN_LAST = "metadata.json"


def patch() -> Patch:
    """For `megatron.training`, once it is imported."""
    return Patch(
        "megatron's last iteration",
        "megatron.training.checkpointing:read_metadata",
        DISTRIBUTION,
        SUPPORTED,
        repairing,
        ("tracker_filename",),
    )


def repairing(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces `read_metadata`: a file that names no iteration first gets that of the last checkpoint that is whole.

    The replacement raises, on every rank:
        DamagedCheckpointError: there is none beside it.
    """

    @functools.wraps(upstream)
    def read_metadata(tracker_filename: Any) -> Any:
        # Object stores have files that are whole or not there.
        if "://" not in str(tracker_filename):
            path = Path(tracker_filename)
            if dist.is_initialized():
                on_first(lambda: _mend(path))
            else:
                _mend(path)
        return upstream(tracker_filename)

    return read_metadata


def _mend(path: Path) -> None:
    """Not left to the next save, which with --save-retain-interval reads the file before it writes it."""
    text = path.read_text(errors="replace").strip() if path.is_file() else "release"
    if text == "release" or text.isdecimal():
        return
    last = _last_whole(path.parent)
    said = f"{path} names no iteration (it holds {text!r}): a run was ended while it wrote the file"
    if last is None:
        raise DamagedCheckpointError(
            f"{said}. No distributed checkpoint beside it is whole. Write the number of the iteration to go on from "
            "into it, or remove it to start anew."
        )
    durable.write_text(path, str(last))
    print(
        f"dsp_plugin: {said}. It is now {last}, the last whole checkpoint beside it.",
        file=sys.stderr,
        flush=True,
    )


def _last_whole(folder: Path) -> int | None:
    found = [
        int(named[1])
        for path in folder.glob("iter_*")
        if (named := _ITERATION.fullmatch(path.name)) and (path / _WRITTEN_LAST).is_file()
    ]
    return max(found, default=None)
