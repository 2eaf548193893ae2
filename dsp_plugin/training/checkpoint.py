"""What a checkpoint records of how its run was parallelized, and how a load under other settings is judged.

The record is JSON beside the framework's own files. Weights and optimizer states depend neither on the method nor on
the ranks that shared a sequence, so a change of either is noted and never refused; what a framework's format cannot
follow, such as another number of data-parallel ranks, the framework's patch names as fixed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dsp_plugin.errors import DamagedCheckpointError, SequenceParallelConfigError
from dsp_plugin.training import durable

FILE = "sequence_parallel.json"
FORMAT = 1
# Settings of what a run prints about itself: no change of them is worth a note.
_NEVER_NOTED = ("quiet",)


def record(config: BaseModel | None, framework: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What to write beside a checkpoint.

    Args:
        config: settings of the run; None for one that shards no sequence.
        framework: ``"deepspeed"`` or ``"megatron"``.
        sizes: ranks by axis, such as ``{"world": 8, "tp": 2, "pp": 1, "dp": 2, "sp": 2}``.

    Returns:
        Nothing but what JSON holds.
    """
    return {
        "format": FORMAT,
        "plugin": metadata.version("dsp-plugin"),
        "framework": framework,
        "config": _all_settings(config),
        "sizes": dict(sizes),
    }


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes the record to `FILE` in the folder, which is made if it is missing. One rank calls it.

    A reader, or a run that is killed meanwhile, leaves either the file that was there before or the whole new one.
    """
    durable.write_text(folder / FILE, json.dumps(record, indent=1))


def read(folder: Path) -> dict[str, Any] | None:
    """The record in the folder; None where there is none, as in checkpoints of runs without this library.

    Raises:
        UnsupportedError: a format that this version does not know.
        DamagedCheckpointError: the file is not a record.
    """
    path = folder / FILE
    found = durable.read_json(path, FORMAT, _malformed, ": weights do not depend on it")
    if found is None:
        return None
    for wrong in _wrong_fields(found):
        raise _malformed(path, wrong)
    return found


def check(
    recorded: Mapping[str, Any],
    config: BaseModel | None,
    framework: str,
    sizes: Mapping[str, int],
    *,
    fixed: Iterable[str],
    remedy: str | None = None,
) -> list[str]:
    """Judges a load of a checkpoint with this record by a run of this config and these sizes.

    Args:
        recorded: from `read`.
        config, framework, sizes: of the run that loads, as for `record`.
        fixed: names of sizes that the checkpoint's format cannot follow in a change.
        remedy: what to do about a change of one of them.

    Returns:
        What changed, for the log, such as ``"sequence_parallel.size 2 -> 4"``. Sizes that only one side names, and
        settings that only one side's version knows, are not compared, nor is ``quiet``.

    Raises:
        SequenceParallelConfigError: another framework wrote it, or a fixed size differs.
    """
    if recorded["framework"] != framework:
        raise SequenceParallelConfigError(
            f"the checkpoint was written by {recorded['framework']} and this run is {framework}: their files hold "
            f"weights and optimizer states in different forms. Load it with {recorded['framework']}, or convert its "
            "weights with the tools of both and start the optimizer anew."
        )
    saved: Mapping[str, int] = recorded["sizes"]
    changed = {name: (saved[name], sizes[name]) for name in saved if name in sizes and saved[name] != sizes[name]}
    notes = [*_config_notes(recorded["config"], config)]
    notes += [f"{name} {old} -> {new}" for name, (old, new) in changed.items() if name != "sp"]
    broken = [name for name in fixed if name in changed]
    if broken:
        where = ", ".join(f"{name} {old}" for name, old in saved.items())
        raise SequenceParallelConfigError(
            setting=", ".join(broken),
            value=changed[broken[0]][1] if len(broken) == 1 else [changed[name][1] for name in broken],
            why=f"the checkpoint was written by a run of {where}, and its files cannot be loaded under another "
            f"{' or '.join(broken)} ({'; '.join(notes)})",
            remedy=remedy or f"start with {', '.join(f'{name} {changed[name][0]}' for name in broken)} again",
        )
    return notes


def _all_settings(config: BaseModel | None) -> dict[str, Any] | None:
    return None if config is None else config.model_dump(mode="json")


def _config_notes(saved: Mapping[str, Any] | None, config: BaseModel | None) -> Iterator[str]:
    given = _all_settings(config)
    if saved is None or given is None:
        if saved is not given:
            yield f"sequence_parallel {_in_words(saved)} -> {_in_words(given)}"
        return
    for key, new in given.items():
        if key not in _NEVER_NOTED and key in saved and saved[key] != new:
            yield f"sequence_parallel.{key} {_shown(saved[key])} -> {_shown(new)}"


def _in_words(config: Mapping[str, Any] | None) -> str:
    return "none" if config is None else f"{config.get('method')} of {config.get('size')} ranks"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _wrong_fields(found: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(found.get("framework"), str):
        yield "it names no framework"
    if not isinstance(found.get("config", 0), dict | None):
        yield "its config is neither a section nor null"
    sizes = found.get("sizes")
    if not isinstance(sizes, dict) or not all(type(size) is int and size > 0 for size in sizes.values()):
        yield "its sizes are not counts of ranks by name"


def _malformed(path: Path, why: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} is not a record of a checkpoint: {why}. Restore the file, or remove it to load without this check: "
        "weights do not depend on it."
    )
