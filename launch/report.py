"""What a launched run put on the wire and held in memory, written by every rank when its script ends."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsp_plugin.comm import ledger


@contextmanager
def report(folder: Path | None) -> Iterator[None]:
    """Keep a ledger for the block and write ``folder/rank-R.json``: its rows, and the process's peak memory in bytes.

    Without a folder nothing is kept.
    """
    if folder is None:
        yield
        return
    with ledger() as log:
        try:
            yield
        finally:
            folder.mkdir(parents=True, exist_ok=True)
            rank = int(os.environ.get("RANK", "0"))
            content = {
                "rank": rank,
                "ledger": [row._asdict() for row in log.rows()],
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "peak_device_bytes": _peak_device_bytes(),
            }
            (folder / f"rank-{rank}.json").write_text(json.dumps(content, indent=1))


def _peak_device_bytes() -> int:
    torch = sys.modules.get("torch")
    return int(torch.cuda.max_memory_allocated()) if torch is not None and torch.cuda.is_initialized() else 0
