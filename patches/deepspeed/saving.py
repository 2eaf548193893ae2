"""`save_checkpoint` in an order that may be cut anywhere: ``latest`` names a checkpoint when all ranks have written it.

DeepSpeed's first rank writes ``latest`` when its own files are there, in place. Here every rank first waits until the
disk has its files and takes their fingerprints; then the first rank writes the list of all, and at last ``latest``.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.patches.deepspeed.checkpoint import sizes
from dsp_plugin.patches.deepspeed.choice import LATEST, STATES
from dsp_plugin.patches.deepspeed.engine import CONFIG
from dsp_plugin.training import checkpoint, durable
from dsp_plugin.training.agreed import on_all, on_first
from dsp_plugin.training.manifest import Fingerprint, Manifest

logger = logging.getLogger(__name__)

_PENDING = "_sequence_parallel_save"


def saving(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``DeepSpeedEngine.save_checkpoint``: also writes our record and the list of files, and ``latest`` last.

    The replacement raises on every rank what the disk refuses one.
    """
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def save_checkpoint(self: Any, *args: Any, **kwargs: Any) -> Any:
        config: SequenceParallelConfig | None = vars(self).get(CONFIG)
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        if config is None or not given["save_dir"]:
            return upstream(self, *args, **kwargs)
        tag = f"global_step{self.global_steps}" if given["tag"] is None else str(given["tag"])
        save = _Save(
            Path(os.path.abspath(given["save_dir"])),
            tag,
            Manifest(step=self.global_steps, resumable=bool(given["save_latest"])),
            shared=not self.use_node_local_storage(),
            # Others may cut a file, or name it otherwise.
            whole=type(self.checkpoint_engine).__name__ == "TorchCheckpointEngine",
        )
        on_first(lambda: save.begin(checkpoint.record(config, "deepspeed", sizes(self))))
        decoupled = self.checkpoint_engine.is_decoupled()
        given["save_latest"] = given["save_latest"] and decoupled
        with save.noting(self.checkpoint_engine):
            result = upstream(*call.args, **call.kwargs)
        if decoupled:
            setattr(self, _PENDING, save)
        else:
            save.finish()
        return result

    return save_checkpoint


def committing(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``DeepSpeedEngine._commit_decoupled_checkpoint``, which ends a save that goes on beside training."""

    @functools.wraps(upstream)
    def commit(self: Any) -> Any:
        save: _Save | None = vars(self).pop(_PENDING, None)
        info = None if save is None else self.checkpoint_engine.get_commit_info()
        if save is None or info is None:
            return upstream(self)
        info.save_latest = False
        result = upstream(self)
        save.finish()
        return result

    return commit


@dataclass
class _Save:
    """One save, as a rank sees it.

    Attributes:
        root: the folder with ``latest``; the checkpoint's is `tag` below it.
        started: the manifest of a save that has not ended.
        shared: whether all ranks write to the same folder.
        whole: whether all that a load finds by pattern passes through this rank's `noting`.
        written: files that this rank has handed to DeepSpeed's writer.
    """

    root: Path
    tag: str
    started: Manifest
    shared: bool
    whole: bool
    written: list[Path] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.root / self.tag

    def begin(self, record: dict[str, Any]) -> None:
        """On the first rank, before any other file: what is in the folder is not to be loaded from here on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.shared:
            self.started.write(self.folder)
        checkpoint.write(self.folder, record)

    @contextmanager
    def noting(self, writer: Any) -> Iterator[None]:
        """Notes the names under which DeepSpeed saves in the block."""
        upstream = writer.save

        @functools.wraps(upstream)
        def save(state_dict: Any, path: Any) -> Any:
            self.written.append(Path(os.path.abspath(path)))
            return upstream(state_dict, path)

        writer.save = save
        try:
            yield
        finally:
            del writer.save

    def finish(self) -> None:
        """On every rank, when DeepSpeed has written the files of all."""
        files = {name: found for of_rank in on_all(self._seal) for name, found in of_rank.items()}
        on_first(lambda: self._publish(files))

    def _seal(self) -> dict[str, Fingerprint]:
        found = {}
        for path in self.written:
            if path.is_file() and path.is_relative_to(self.folder):
                durable.sync(path)
                found[path.relative_to(self.folder).as_posix()] = Fingerprint.of(path)
        return found

    def _publish(self, files: dict[str, Fingerprint]) -> None:
        if self.shared:
            if self.whole:
                self._remove_leftovers(files)
            durable.sync_folder(self.folder)
            Manifest(self.started.step, True, self.started.resumable, self.whole, files).write(self.folder)
        durable.sync_folder(self.root)
        if self.started.resumable:
            durable.write_text(self.root / LATEST, self.tag)

    def _remove_leftovers(self, files: dict[str, Fingerprint]) -> None:
        """A save of another world that ended here before leaves shards that would be found beside these."""
        for path in self.folder.glob(STATES):
            if path.name not in files:
                logger.warning("removed %s, which an earlier save left in the folder of this one", path)
                path.unlink()
