"""One rank that runs scripts one after the other: ``trainer_worker.py FOLDER SECTION NAME...``, SECTION in JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1] / "deepspeed"))

from accelerate_cases import LOOPS, WRAPPED_LOOPS
from script_world import run_scripts
from trainer_cases import DDP_SCRIPTS, SCRIPTS


def main() -> None:
    """Writes what each came to as ``NAME.rankR.json``."""
    folder, section, names = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    scripts = {**SCRIPTS, **LOOPS, **DDP_SCRIPTS, **WRAPPED_LOOPS}
    run_scripts(names, folder, lambda name: scripts[name].run(folder / name, section))


if __name__ == "__main__":
    main()
