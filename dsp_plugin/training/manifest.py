"""Which files a checkpoint consists of: written once all ranks have written theirs, compared before one is loaded.

It is JSON in the checkpoint's folder, and says of every file its size and a checksum of samples of it. That tells a
file that is cut, missing or another one, such as two ranks' shards in each other's place, without reading all of it. A
bit that flips between the samples of a large file goes unseen.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from zlib import crc32

from dsp_plugin.errors import DamagedCheckpointError
from dsp_plugin.training import durable

FILE = "sequence_parallel_files.json"
FORMAT = 1
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class Fingerprint:
    """A file's size in bytes, and the CRC-32 of `_SAMPLES` evenly spaced parts of it, of all of it if it is small."""

    bytes: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> Fingerprint:
        """That of a file as it is."""
        checksum = 0
        with path.open("rb") as file:
            size = file.seek(0, 2)
            for start in _starts(size):
                file.seek(start)
                checksum = crc32(file.read(_SAMPLE_BYTES), checksum)
        return cls(size, checksum)


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        step: optimizer steps done when it was saved.
        complete: False from the start of a save to its end.
        resumable: whether it was saved to go on from, so that ``latest`` named it.
        whole: whether ``files`` names every file of states that a load could find in the folder.
        files: by name below the folder.
    """

    step: int
    complete: bool = False
    resumable: bool = False
    whole: bool = False
    files: Mapping[str, Fingerprint] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes it to `FILE` in the folder, all or nothing. One rank calls it."""
        content = {"format": FORMAT, "plugin": metadata.version("dsp-plugin"), **asdict(self)}
        durable.write_text(folder / FILE, json.dumps(content, indent=1))

    def faults(self, folder: Path, names: Iterable[str]) -> dict[str, str]:
        """What is wrong with some of the files, by name: those that are as they were saved are left out."""
        found = {name: _fault(folder / name, self.files[name]) for name in names}
        by_fingerprint = {fingerprint: name for name, fingerprint in self.files.items()}
        told = {}
        for name, (why, actual) in ((name, fault) for name, fault in found.items() if fault is not None):
            other = by_fingerprint.get(actual) if actual is not None else None
            told[name] = f"it is what was saved as {other}" if other is not None else why
        return told


def read(folder: Path) -> Manifest | None:
    """The manifest in the folder; None where there is none, as in checkpoints of runs without this library.

    Raises:
        DamagedCheckpointError: the file is not a manifest.
        UnsupportedError: a format that this version does not know.
    """
    path = folder / FILE
    found = durable.read_json(path, FORMAT, _malformed, "")
    if found is None:
        return None
    try:
        files = {str(name): Fingerprint(int(one["bytes"]), int(one["crc32"])) for name, one in found["files"].items()}
        flags = {name: bool(found[name]) for name in ("complete", "resumable", "whole")}
        return Manifest(step=int(found["step"]), files=files, **flags)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(path, f"{type(error).__name__}: {error}") from None


def unreadable(path: Path) -> str | None:
    """What can be told without a manifest: that a file is missing, empty, or an archive of torch that has lost its end.

    Returns:
        What is wrong; None where nothing is seen.
    """
    if not path.is_file():
        return "it is missing"
    with path.open("rb") as file:
        start = file.read(4)
        if not start:
            return "it is empty"
        if start.startswith(b"PK"):
            try:
                zipfile.ZipFile(file).close()
            except zipfile.BadZipFile:
                return f"it is cut: its {path.stat().st_size:,} bytes do not end as torch's archives do"
    return None


def _fault(path: Path, saved: Fingerprint) -> tuple[str, Fingerprint | None] | None:
    if not path.is_file():
        return "it is missing", None
    actual = Fingerprint.of(path)
    if actual == saved:
        return None
    if actual.bytes != saved.bytes:
        return f"it has {actual.bytes:,} bytes, and {saved.bytes:,} were saved", actual
    return "its content is not what was saved", actual


def _starts(size: int) -> Iterable[int]:
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return range(0, size, _SAMPLE_BYTES)
    return [index * (size - _SAMPLE_BYTES) // (_SAMPLES - 1) for index in range(_SAMPLES)]


def _malformed(path: Path, why: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} does not list the files of a checkpoint: {why}. Restore the file, or remove it to load without this "
        "check."
    )
