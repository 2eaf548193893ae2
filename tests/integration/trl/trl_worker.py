"""One rank of a world that runs groups of cases: ``trl_worker.py FOLDER GROUP...``, see `deepspeed_worker`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1] / "deepspeed"))

from deepspeed_worker import main

if __name__ == "__main__":
    main()
