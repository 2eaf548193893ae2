"""The list of a checkpoint's files: what it holds, how it is written and read, and what it finds wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from dsp_plugin import DamagedCheckpointError, UnsupportedError
from dsp_plugin.training import durable
from dsp_plugin.training.manifest import FILE, Fingerprint, Manifest, read, unreadable

LARGE = 10_000_000
NAMES = ("shard0.pt", "shard1.pt")


def saved(folder: Path) -> Manifest:
    """Two files and the list of them."""
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(bytes([number]) * 1000)
    whole = Manifest(3, True, True, True, {name: Fingerprint.of(folder / name) for name in NAMES})
    whole.write(folder)
    return whole


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    """And nothing is wrong with it; no list is None."""
    assert read(tmp_path) is None
    whole = saved(tmp_path)
    assert read(tmp_path) == whole
    assert whole.faults(tmp_path, NAMES) == {}
    Manifest(step=4).write(tmp_path)
    assert read(tmp_path) == Manifest(step=4, complete=False)


def test_every_fault_is_told_from_the_others(tmp_path: Path) -> None:
    whole = saved(tmp_path)
    first, second = (tmp_path / name for name in NAMES)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert whole.faults(tmp_path, NAMES) == {"shard0.pt": "it is what was saved as shard1.pt"}
    first.write_bytes(content[:-1] + b"\1")
    assert whole.faults(tmp_path, NAMES) == {"shard0.pt": "its content is not what was saved"}
    os.truncate(first, 10)
    second.unlink()
    assert whole.faults(tmp_path, NAMES) == {
        "shard0.pt": "it has 10 bytes, and 1,000 were saved",
        "shard1.pt": "it is missing",
    }
    assert whole.faults(tmp_path, NAMES[1:]) == {"shard1.pt": "it is missing"}


@pytest.mark.parametrize("place", [0, 65_535, LARGE - 65_536, LARGE - 1, LARGE // 2])
def test_a_large_file_is_sampled_from_end_to_end(place: int, tmp_path: Path) -> None:
    """Torch's archives have the checksums of all tensors at their end. Between samples nothing is seen."""
    path = tmp_path / "large"
    path.write_bytes(bytes(LARGE))
    before = Fingerprint.of(path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\1")
    assert (Fingerprint.of(path) != before) == (place != LARGE // 2)
    assert before.bytes == LARGE


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is not JSON"),
        ("[" * 200_000, "it is not JSON"),
        ("[]", "it has no format number"),
        ('{"format": 1}', "KeyError"),
        ('{"format": 1, "files": []}', "AttributeError"),
        ('{"format": 1, "files": {"a": {"bytes": "many", "crc32": 1}}}', "ValueError"),
    ],
)
def test_a_file_that_is_no_list_is_named(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DamagedCheckpointError, match=rf"{FILE} does not list the files of a checkpoint: {why}"):
        read(tmp_path)


def test_a_later_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"format": 2, "plugin": "9.9"}))
    with pytest.raises(UnsupportedError, match=r"format=2: it was written by dsp-plugin 9\.9"):
        read(tmp_path)


def test_what_can_be_told_without_a_list(tmp_path: Path) -> None:
    """Whether a file is there, and whether an archive has its end; a legacy pickle has none."""
    path = tmp_path / "states.pt"
    assert unreadable(path) == "it is missing"
    path.touch()
    assert unreadable(path) == "it is empty"
    torch.save({"weight": torch.zeros(100)}, path)
    assert unreadable(path) is None
    os.truncate(path, path.stat().st_size - 30)
    assert str(unreadable(path)).startswith("it is cut")
    torch.save({"weight": torch.zeros(100)}, path, _use_new_zipfile_serialization=False)
    assert unreadable(path) is None


def test_what_is_written_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the content, then the name, then the folder that holds the name."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda source, target: (done.append(str(target)), replace(source, target)))
    durable.write_text(tmp_path / "latest", "global_step3")
    assert done[0].startswith(str(tmp_path / ".latest."))
    assert done[1:] == [str(tmp_path / "latest"), str(tmp_path)]
