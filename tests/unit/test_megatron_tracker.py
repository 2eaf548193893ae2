"""Megatron's file of the last iteration, which a kill can leave empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsp_plugin import DamagedCheckpointError
from dsp_plugin.patches.megatron.tracker import repairing


def exits(tracker_filename: Any) -> Any:
    """As Megatron does where the file names no iteration."""
    text = Path(tracker_filename).read_text().strip()
    if text == "release":
        return 0, True
    if not text.isdecimal():
        raise SystemExit
    return int(text), False


def tracker(folder: Path, text: str, *whole: int) -> Path:
    """The file, and checkpoints beside it of which these are whole."""
    for iteration in (2, 4, 6):
        (folder / f"iter_{iteration:07d}").mkdir()
    for iteration in whole:
        (folder / f"iter_{iteration:07d}" / "metadata.json").touch()
    path = folder / "latest_checkpointed_iteration.txt"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("text", "found"), [("2\n", (2, False)), ("release", (0, True))])
def test_a_whole_file_is_read_as_ever(text: str, found: tuple[int, bool], tmp_path: Path) -> None:
    assert repairing(exits)(tracker(tmp_path, text, 2, 4)) == found


@pytest.mark.parametrize("text", ["", "\0\0", "4\n5"])
def test_a_damaged_file_is_named_and_the_last_whole_iteration_taken(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the one after it, whose save was cut; upstream would exit as if all were well."""
    path = tracker(tmp_path, text, 2, 4)
    assert repairing(exits)(str(path)) == (4, False)
    said = capsys.readouterr().err
    assert f"{path} names no iteration (it holds {text!r})" in said
    assert "It is now 4" in said
    assert path.read_text() == "4"


def test_with_nothing_whole_beside_it_it_is_refused(tmp_path: Path) -> None:
    path = tracker(tmp_path, "")
    with pytest.raises(DamagedCheckpointError, match=r"latest_checkpointed_iteration\.txt names no iteration"):
        repairing(exits)(path)


def test_what_is_not_there_is_left_to_megatron(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        repairing(exits)(tmp_path / "missing.txt")
