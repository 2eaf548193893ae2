"""A script for the tests of failing ranks: ranks exchange tensors until a file says stop, or until one of them ends.

    exchanging_script.py FOLDER [RANK WAY]

Every rank writes its pid to FOLDER/R.pid once it is under way, and stops when there is FOLDER/stop. RANK ends after a
few rounds in a WAY of its own: it raises, exits with a status, returns, or makes a child process that outlives it.
With "raise together" all raise; with "threads" all end, and say what threads they have. COLLECTIVE_SECONDS in the
environment is how long a collective may take.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.comm.collectives import ring_hop, summed
from dsp_plugin.comm.wire import Sender, exchange

ROUNDS = 3


def main() -> None:
    """Exchanges until told otherwise."""
    folder, *rest = sys.argv[1:]
    rank, way = (int(rest[0]), rest[1]) if rest else (-1, "")
    limit = os.environ.get("COLLECTIVE_SECONDS")
    dist.init_process_group("gloo", timeout=None if limit is None else timedelta(seconds=float(limit)))
    size = dist.get_world_size()
    axis = SequenceParallelGroups.build(SequenceParallelConfig(method="ulysses", size=size)).sp
    sender = Sender(axis, "ulysses", "forward")
    buffer = torch.ones(size * 50_000)
    counts = [50_000] * size
    step = 0
    stop = torch.zeros(1)
    while not stop.item():
        exchange(buffer, counts, counts, sender)
        ring_hop(buffer, 1, axis=axis, method="ring")
        stop = summed(torch.tensor([float(os.path.exists(f"{folder}/stop"))]), sender)
        step += 1
        if step == ROUNDS:
            if dist.get_rank() == rank:
                end(way)
            if way == "raise together":
                raise ValueError("the learning rate is blue")
            if way == "threads":
                print([thread.name for thread in threading.enumerate()])
                return
            if way == "return" and dist.get_rank() != rank:
                time.sleep(1.0)
                return
            Path(folder, f"{dist.get_rank()}.pid").write_text(str(os.getpid()))
    dist.destroy_process_group()


def end(way: str) -> None:
    """This rank's own way out."""
    if way == "raise":
        raise ValueError("the learning rate is blue")
    if way == "exit":
        sys.exit(3)
    if way == "fork" and os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    if way == "return":
        sys.exit(0)


if __name__ == "__main__":
    main()
