"""Small files that are there whole or not at all, whatever ends the process or the machine meanwhile."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Puts a file in place of what was there; its folder is made if it is missing.

    A reader, or a run that is killed meanwhile, leaves either the file that was there before or the whole new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files for their owner alone; checkpoints are shared like the files beside them.
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync(path: Path) -> None:
    """Waits until the content of a file is on its disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on its disk, where its file system can say so."""
    with contextlib.suppress(OSError):
        sync(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
