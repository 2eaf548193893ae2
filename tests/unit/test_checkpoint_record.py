"""The record beside a checkpoint: what it holds, how it is written and read, and how a load is judged by it."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError, UnsupportedError
from dsp_plugin.training.checkpoint import FILE, check, read, record, write

SIZES = {"world": 4, "tp": 1, "pp": 1, "dp": 2, "sp": 2}
LM = {"attention": ["layers.*.attn"], "batch": {"input_ids": 1, "labels": 1}, "loss": {"labels": "labels"}}


def config(method: str = "ulysses", size: int = 2, **further: Any) -> SequenceParallelConfig:
    return SequenceParallelConfig(method=method, size=size, **further)


def recorded(**changes: Any) -> dict[str, Any]:
    return {**record(config(**LM), "deepspeed", SIZES), **changes}


def test_what_is_read_is_what_was_recorded(tmp_path: Path) -> None:
    """JSON alone: tuples, sections within the section and absent values included."""
    written = recorded()
    write(tmp_path / "new" / "folder", written)
    found = read(tmp_path / "new" / "folder")
    assert found == json.loads(json.dumps(written)) == written
    assert found["config"] == config(**LM).model_dump(mode="json")
    assert found["plugin"]
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == [FILE]


def test_a_run_without_a_section_is_recorded_too(tmp_path: Path) -> None:
    """None stays None."""
    write(tmp_path, record(None, "deepspeed", {"world": 1}))
    assert (read(tmp_path) or {})["config"] is None


def test_no_record_is_none(tmp_path: Path) -> None:
    """A checkpoint of a run without this library."""
    assert read(tmp_path) is None


def test_a_write_that_fails_leaves_the_old_record(tmp_path: Path) -> None:
    """Neither half a file nor a temporary one."""
    write(tmp_path, recorded())
    with pytest.raises(TypeError):
        write(tmp_path, {**recorded(), "sizes": {"world": object()}})
    assert read(tmp_path) == recorded()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    """As the framework's files beside it."""
    before = os.umask(0o027)
    try:
        write(tmp_path, recorded())
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "it is not JSON"),
        (b'{"format": 1, "framework": "deep', "it is not JSON"),
        (b"\xff\xfe\x00", "it is not JSON"),
        (b"[" * 200_000, "it is not JSON"),
        (b"[1, 2]", "it has no format number"),
        (b'{"format": "1"}', "it has no format number"),
        (b'{"format": 1}', "it names no framework"),
        (b'{"format": 1, "framework": "deepspeed", "sizes": {}}', "its config is neither a section nor null"),
        (b'{"format": 1, "framework": "deepspeed", "config": [], "sizes": {}}', "its config is neither a section"),
        (b'{"format": 1, "framework": "deepspeed", "config": null}', "its sizes are not counts"),
        (b'{"format": 1, "framework": "deepspeed", "config": null, "sizes": {"dp": "2"}}', "its sizes are not counts"),
        (b'{"format": 1, "framework": "deepspeed", "config": null, "sizes": {"dp": true}}', "its sizes are not counts"),
    ],
)
def test_what_is_no_record_is_refused(text: bytes, why: str, tmp_path: Path) -> None:
    """With the path, the reason and what to do."""
    (tmp_path / FILE).write_bytes(text)
    with pytest.raises(SequenceParallelConfigError) as error:
        read(tmp_path)
    assert str(tmp_path / FILE) in str(error.value)
    assert why in str(error.value)
    assert "remove it to load without this check" in str(error.value)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    """With who wrote it and which versions read it."""
    write(tmp_path, recorded(format=2, plugin="9.1"))
    with pytest.raises(UnsupportedError, match=r"format=2: it was written by dsp-plugin 9\.1;.* reads format 1\. Load"):
        read(tmp_path)


def test_the_same_settings_leave_nothing_to_note() -> None:
    """Whatever is fixed, and whatever the run prints about itself."""
    assert check(recorded(), config(**LM), "deepspeed", SIZES, fixed=list(SIZES)) == []
    assert check(recorded(), config(**LM, quiet=True), "deepspeed", SIZES, fixed=list(SIZES)) == []


def test_changes_of_settings_and_sizes_are_noted() -> None:
    """By the names that users write."""
    now = config("ring", 4, **LM, debug=True)
    notes = check(recorded(), now, "deepspeed", {**SIZES, "dp": 1, "sp": 4}, fixed=["world", "tp", "pp"])
    assert notes == [
        "sequence_parallel.method ulysses -> ring",
        "sequence_parallel.size 2 -> 4",
        "sequence_parallel.ulysses_size 2 -> 1",
        "sequence_parallel.ring_size 1 -> 4",
        "sequence_parallel.debug false -> true",
        "dp 2 -> 1",
    ]


@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        (config(), None, "sequence_parallel ulysses of 2 ranks -> none"),
        (None, config("lasp", 4), "sequence_parallel none -> lasp of 4 ranks"),
        (None, None, None),
    ],
)
def test_a_section_may_come_and_go(
    before: SequenceParallelConfig | None, after: SequenceParallelConfig | None, note: str | None
) -> None:
    """Unsharded runs continue sharded ones, and the other way round."""
    found = check(record(before, "deepspeed", SIZES), after, "deepspeed", SIZES, fixed=["world"])
    assert found == ([] if note is None else [note])


def test_settings_of_other_versions_are_not_compared() -> None:
    """A key that came or went with a version is no change that the user made."""
    saved = recorded()
    saved["config"] = {key: value for key, value in saved["config"].items() if key != "debug"} | {"of_old": 3}
    assert check(saved, config(**LM, debug=True), "deepspeed", {"world": 4, "ep": 2}, fixed=["world", "ep"]) == []


def test_a_change_of_a_fixed_size_is_refused() -> None:
    """With the sizes of both runs and what to do."""
    with pytest.raises(SequenceParallelConfigError) as error:
        check(recorded(), config(size=4), "deepspeed", {**SIZES, "world": 8}, fixed=["tp", "world"])
    assert "world=8" in str(error.value)
    assert "a run of world 4, tp 1, pp 1, dp 2, sp 2" in str(error.value)
    assert "sequence_parallel.size 2 -> 4" in str(error.value)
    assert str(error.value).endswith("Start with world 4 again.")
    with pytest.raises(SequenceParallelConfigError, match=r"Convert it with ds_to_universal\.$"):
        check(
            recorded(), config(), "deepspeed", {"world": 8}, fixed=["world"], remedy="convert it with ds_to_universal"
        )


def test_another_framework_is_refused() -> None:
    """Whatever the sizes."""
    with pytest.raises(SequenceParallelConfigError, match="written by deepspeed and this run is megatron"):
        check(recorded(), config(), "megatron", SIZES, fixed=[])
