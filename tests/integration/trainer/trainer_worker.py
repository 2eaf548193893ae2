"""One rank that runs scripts one after the other: ``trainer_worker.py FOLDER SECTION NAME...``, SECTION in JSON."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import torch.distributed as dist
from accelerate_cases import LOOPS, WRAPPED_LOOPS
from trainer_cases import DDP_SCRIPTS, SCRIPTS


def main() -> None:
    """Writes what each came to as ``NAME.rankR.json``."""
    folder, section, names = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    for name in names:
        print(f"case {name}", flush=True)
        failed = None
        try:
            result = {**SCRIPTS, **LOOPS, **DDP_SCRIPTS, **WRAPPED_LOOPS}[name].run(folder / name, section)
        except BaseException:
            failed = traceback.format_exc()
            result = {"failed": failed}
        rank = dist.get_rank() if dist.is_initialized() else 0
        (folder / f"{name}.rank{rank}.json").write_text(json.dumps(result))
        assert failed is None, failed
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
