"""Runs a DeepSpeed script, a rank of which is killed with SIGKILL at a point of a save.

    killed_in_save.py KILLS FOLDER SCRIPT [ARGS ...]

KILLS is JSON, for each start of the ranks ``[rank, step, point]``; further starts are left alone. A point is a file
operation in FOLDER, inside ``save_checkpoint`` after so many steps, such as ``rename latest``. What a rank met in its
last save is in ``points.RANK.json``.
"""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import signal
import sys
import time
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine

import dsp_plugin  # noqa: F401 - patches what is wrapped below.

OTHERS_GO_ON = 1.0
"""Seconds that the other ranks have to do all that does not wait for the one that is killed."""
_RANDOM = re.compile(r"(?<=\.)\w{8}$")
_AUDITED = {"open": (0, "open"), "os.rename": (1, "rename"), "os.remove": (0, "remove")}


class Points:
    """File operations in a save, in order; one of them may be this rank's last."""

    def __init__(self, folder: Path, kill: tuple[int, int, str] | None) -> None:
        self.rank = int(os.environ["RANK"])
        self.folder, self.kill = folder, kill
        self.step: int | None = None
        self.met: list[str] = []

    def label(self, operation: str, path: str) -> str:
        """What a point is called: the second one alike in a save ends in #2, and so on."""
        name = f"{operation} {_RANDOM.sub('', Path(path).name)}"
        again = sum(point.split("#")[0] == name for point in self.met) + 1
        return name if again == 1 else f"{name}#{again}"

    def is_last(self, label: str) -> bool:
        """Whether this rank is to die there."""
        return self.kill is not None and [self.rank, self.step, label] == list(self.kill)

    def meet(self, operation: str, path: object) -> None:
        """A point; does not return where it is the last."""
        if self.step is None or not isinstance(path, str | os.PathLike):
            return
        label = self.label(operation, os.fspath(path))
        self.met.append(label)
        if self.is_last(label):
            time.sleep(OTHERS_GO_ON)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """What Python itself does to files of the folder, before it is done."""
        if self.step is None or event not in _AUDITED:
            return
        place, operation = _AUDITED[event]
        path = arguments[place]
        flags = arguments[2] if event == "open" else os.O_WRONLY
        if isinstance(path, str) and path.startswith(str(self.folder)) and flags & (os.O_WRONLY | os.O_RDWR):
            self.meet(operation, path)


def install(points: Points) -> None:
    """Wraps what writes files."""
    save_checkpoint, save, fsync = DeepSpeedEngine.save_checkpoint, torch.save, os.fsync

    @wraps(save_checkpoint)
    def saving(self: Any, *args: Any, **kwargs: Any) -> Any:
        points.met, points.step = [], self.global_steps
        try:
            return save_checkpoint(self, *args, **kwargs)
        finally:
            points.step = None
            Path(f"points.{points.rank}.json").write_text(json.dumps(points.met))

    @wraps(save)
    def halved(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        points.meet("before", f)
        if points.is_last(points.label("half", str(f))):
            whole = io.BytesIO()
            save(obj, whole, *args, **kwargs)
            Path(f).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        points.meet("half", f)
        save(obj, f, *args, **kwargs)
        points.meet("after", f)

    @wraps(fsync)
    def synced(handle: int) -> None:
        points.meet("fsync", os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    DeepSpeedEngine.save_checkpoint, torch.save, os.fsync = saving, halved, synced
    sys.addaudithook(points.audit)


def main() -> None:
    """See above."""
    kills, folder, script, *arguments = sys.argv[1:]
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    kill = dict(enumerate(json.loads(kills))).get(start)
    install(Points(Path(folder), kill))
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
