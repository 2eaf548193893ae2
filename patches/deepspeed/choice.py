"""Which checkpoint a load takes: the one that is asked for, or, where ``latest`` asks, the last whole one up to it.

All ranks look at the files, each at those that it will read and at its part of the rest, and all come to one answer.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsp_plugin.errors import DamagedCheckpointError, SequenceParallelConfigError
from dsp_plugin.training import manifest
from dsp_plugin.training.agreed import on_all, on_first
from dsp_plugin.training.manifest import Manifest

LATEST = "latest"
STATES = "*_states.pt"
"""What DeepSpeed finds by pattern in a checkpoint's folder."""
_SHARDS = "optim_states.pt"
_STEP = re.compile(r"global_step(\d+)")


@dataclass(frozen=True)
class Choice:
    """A load of an engine.

    Attributes:
        root: the folder with ``latest`` and a folder for each tag.
        states: whether each rank reads its optimizer's states.
        shards: whether the files with these states are read, by each rank its own or by all of them all.
        judge: raises SequenceParallelConfigError where this run cannot load what a tag's folder holds.
    """

    engine: Any
    root: Path
    states: bool
    shards: bool
    judge: Callable[[str], object]

    def tag(self, asked: object) -> str | None:
        """The tag to load; None where none is asked for and ``latest`` is missing. Every rank calls it.

        Raises, on every rank:
            DamagedCheckpointError: what is asked for is not whole; it names the last one that is.
        """
        universal = self.engine.load_universal_checkpoint()
        pointer = self.root / (f"{LATEST}_universal" if universal else LATEST)
        tag = str(asked) if asked is not None else on_first(lambda: _text(pointer))
        if tag is None:
            return None
        faults = self._faults_of(tag) if tag else [f"{pointer}: it is empty"]
        if not faults:
            return tag
        # Only checkpoints of the plain format have a list of their files.
        good = None if universal else self._last_good(tag)
        if asked is not None or good is None:
            raise DamagedCheckpointError(self._refusal(tag, faults, good))
        if dist.get_rank() == 0:
            print(
                f"dsp_plugin: {self.root / tag}, which {pointer} names, is not whole: {'; '.join(faults)}. Going on "
                f"from {self.root / good}, the last whole checkpoint before it.",
                file=sys.stderr,
                flush=True,
            )
        return good

    def _faults_of(self, tag: str) -> list[str]:
        """As `_faults`, and its record's; raises what `judge` has against a record that is whole."""
        try:
            # First, for a run of other sizes would miss files that never were.
            on_first(lambda: self.judge(tag))
        except DamagedCheckpointError as error:
            return [str(error).rstrip(".")]
        return self._faults(tag)

    def _faults(self, tag: str) -> list[str]:
        """What is wrong with a tag's files, by name; the same on every rank."""
        folder = self.root / tag
        found, why = on_first(lambda: _manifest(folder))
        if why is not None:
            return [why]
        by_rank = on_all(lambda: self._seen(tag, found))
        faults = {name: fault for of_rank in by_rank for name, fault in of_rank.items()}
        return [f"{folder / name}: {fault}" for name, fault in sorted(faults.items())]

    def _seen(self, tag: str, found: Manifest | None) -> dict[str, str]:
        """What this rank finds wrong, by name."""
        folder, own = self.root / tag, {path.name: path for path in self._read_here(tag)}
        if found is None:
            return {name: why for name, path in own.items() if (why := manifest.unreadable(path)) is not None}
        needed = sorted(name for name in found.files if self.shards or not name.endswith(_SHARDS))
        mine = {*needed[dist.get_rank() :: dist.get_world_size()], *(name for name in needed if name in own)}
        faults = found.faults(folder, sorted(mine))
        if found.whole and dist.get_rank() == 0:
            strangers = {path.name for path in folder.glob(STATES)} - set(found.files)
            faults |= dict.fromkeys(strangers, "it is none of the files that were saved here")
        return faults

    def _read_here(self, tag: str) -> Iterator[Path]:
        """The files that this rank will read, as DeepSpeed names them."""
        engine, root = self.engine, str(self.root)
        model = Path(engine._get_ckpt_name(root, tag))
        others = engine._get_all_ckpt_names(root, tag)
        # Files of another number of stages or tensor-parallel ranks are DeepSpeed's to judge.
        yield model if model.is_file() or not others else Path(others[0])
        if self.states and not engine.load_universal_checkpoint() and hasattr(engine.optimizer, "dp_process_group"):
            shard = Path(engine._get_zero_ckpt_name(root, tag))
            old = shard.with_name(shard.name.replace(f"_{_SHARDS}", _SHARDS))
            yield old if old.is_file() and not shard.is_file() else shard

    def _last_good(self, tag: str) -> str | None:
        """The last checkpoint up to this tag that is whole and that this run can load."""
        for candidate in on_first(lambda: _candidates(self.root, tag)):
            if not self._faults(candidate) and on_first(lambda: self._fits(candidate)):  # noqa: B023 - called at once
                return candidate
        return None

    def _fits(self, tag: str) -> bool:
        try:
            self.judge(tag)
        except SequenceParallelConfigError:
            return False
        return True

    def _refusal(self, tag: str, faults: list[str], good: str | None) -> str:
        said = f"the checkpoint {self.root / tag} is not whole: {'; '.join(faults)}. "
        if good is None:
            said += (
                f"No other checkpoint in {self.root} is known to be whole: restore the files, or start anew from an "
                "empty folder"
            )
        else:
            said += f"Restore the files, or go on from the last whole one: load_checkpoint(..., tag={good!r})"
        listed = self.root / tag / manifest.FILE
        if any("saved" in fault for fault in faults) and listed.is_file():
            said += f". If you changed a file on purpose, remove {listed}"
        return f"{said}."


def _text(path: Path) -> str | None:
    return path.read_text(errors="replace").strip() if path.is_file() else None


def _manifest(folder: Path) -> tuple[Manifest | None, str | None]:
    """The list of a folder's files, and why nothing in the folder can be loaded."""
    if not folder.is_dir():
        return None, f"{folder}: there is no such folder"
    try:
        found = manifest.read(folder)
    except DamagedCheckpointError as error:
        return None, str(error).rstrip(".")
    if found is not None and not found.complete:
        return found, f"{folder}: the run that wrote it ended before all of it was there"
    return found, None


def _candidates(root: Path, tag: str) -> list[str]:
    """Tags beside this one that were saved to go on from, at its step or before, the last first."""
    found: dict[str, Manifest] = {}
    for path in root.glob(f"*/{manifest.FILE}"):
        try:
            listed = manifest.read(path.parent)
        except Exception:
            # Whatever is wrong with it, it is not one to go on from.
            continue
        if listed is not None:
            found[path.parent.name] = listed
    named = _STEP.fullmatch(tag)
    last = found[tag].step if tag in found else int(named[1]) if named else None
    good = [
        name
        for name, listed in found.items()
        if name != tag and listed.complete and listed.resumable and (last is None or listed.step <= last)
    ]
    return sorted(good, key=lambda name: (found[name].step, name), reverse=True)
