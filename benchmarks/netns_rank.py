"""One rank on one host of `benchmarks.netns`: reads its task from a file, and writes the result beside it."""

from __future__ import annotations

import faulthandler
import pickle
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main(folder: Path, rank: int, size: int, timeout: float) -> None:
    """Join the world, work, leave."""
    torch.set_num_threads(1)
    # Shows where a rank hangs, and ends one that outlived its parent.
    faulthandler.dump_traceback_later(timeout, exit=True)
    worker, args = pickle.loads((folder / "task.pickle").read_bytes())
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout + 30.0),
    )
    result = worker(*args)
    (folder / f"result-{rank}.pickle").write_bytes(pickle.dumps(result))
    # gloo waits for peers when it is torn down at exit, unless it was before.
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
