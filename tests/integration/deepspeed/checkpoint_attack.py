"""One rank that saves a checkpoint, puts a pickle that runs a command in its place, and loads it.

    checkpoint_attack.py FOLDER

FOLDER/ran is what the command makes; FOLDER/error.txt is what the load raised.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed_cases import Case, parameters_optimizer

import dsp_plugin  # noqa: F401 - one import makes DeepSpeed honour the section.
from dsp_plugin.errors import UnsupportedError
from dsp_plugin.training.manifest import FILE


class Attack:
    """Unpickling it runs a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def main() -> None:
    """Loads the good checkpoint, then each of its files with the attack in place of what it held."""
    folder = Path(sys.argv[1])
    case = Case("lm", "ulysses", 1, 1, 1)
    model = case.build()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=parameters_optimizer(case, model.parameters()), config=case.config()
    )
    engine.save_checkpoint(str(folder), tag="saved")
    assert engine.load_checkpoint(str(folder))[0] is not None
    # A file that is not the one that was saved is refused before it is read.
    (folder / "saved" / FILE).unlink()
    errors = []
    for path in sorted((folder / "saved").glob("*.pt")):
        good = path.read_bytes()
        torch.save({"module": Attack(f"touch {folder / 'ran'}"), "optimizer_state_dict": {}}, path)
        try:
            engine.load_checkpoint(str(folder))
        except UnsupportedError as error:
            errors.append(str(error))
        path.write_bytes(good)
    (folder / "error.txt").write_text("\n".join(errors))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
