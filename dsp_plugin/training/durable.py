"""Small files that are there whole or not at all, whatever ends the process or the machine meanwhile.

Those with a format number are JSON of our own beside a framework's checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from dsp_plugin.errors import UnsupportedError


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


def read_json(
    path: Path, known: int, malformed: Callable[[Path, str], Exception], without: str
) -> dict[str, Any] | None:
    """The content of a file with a format number; None where there is no file.

    Args:
        known: the format that this version reads.
        malformed: makes the error for a file that is none of its kind, from its path and why.
        without: behind the remedy to remove the file: what that means.

    Raises:
        UnsupportedError: another format.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise malformed(path, f"it is not JSON ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("format"), int):
        raise malformed(path, "it has no format number")
    if found["format"] != known:
        raise UnsupportedError(
            setting=f"{path}: format",
            value=found["format"],
            why=f"it was written by dsp-plugin {found.get('plugin', 'of an unknown version')}; this is dsp-plugin "
            f"{metadata.version('dsp-plugin')}, which reads format {known}",
            remedy="load the checkpoint with the version that wrote it or a later one, or remove the file to load "
            f"without this check{without}",
        )
    return found


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
