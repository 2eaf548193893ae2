"""One rank that runs scripts one after the other: ``trl_worker.py FOLDER SECTION NAME...``, SECTION in JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# TRL runs a kernel of its own wherever Triton is installed, which without a GPU only its interpreter can.
os.environ.setdefault("TRITON_INTERPRET", "1")

sys.path.insert(1, str(Path(__file__).parents[1] / "deepspeed"))

from script_world import run_scripts
from trl_cases import HEAD, MODEL, REFUSED, SCRIPTS


def main() -> None:
    """Writes what each came to as ``NAME.rankR.json``."""
    folder, section, names = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    run_scripts(names, folder, lambda name: came_to(name, folder, section))


def came_to(name: str, folder: Path, section: Any) -> dict[str, Any]:
    """What a script ended with."""
    if name in REFUSED:
        return refused(name, folder, section)
    if name == HEAD:
        from trl_head import differences

        return differences(folder / MODEL, section)
    return SCRIPTS[name].run(folder / name, section)


def refused(name: str, folder: Path, section: dict[str, Any] | None) -> dict[str, Any]:
    """What a script ends with."""
    try:
        REFUSED[name].run(folder / name, section)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {"failed": f"{name} was not refused"}


if __name__ == "__main__":
    main()
