"""A script for the tests of ranks that disagree: one of two ranks does not do what the other does.

    disagreeing_script.py FOLDER SECONDS KIND

SECONDS is how long a collective may take. Rank 1 is the one that is wrong. What goes through in spite of it meets the
collectives of the next step. FOLDER is not used.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dsp_plugin import Layout, SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.comm import all_gather, reduce_scatter
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import METHODS, dsp
from dsp_plugin.methods.method import Where

LENGTH, HEADS, STEPS = 8, 4, 3
Groups = SequenceParallelGroups


def attend(groups: Groups, length: int = LENGTH, heads: int = HEADS, method: str = "ulysses") -> None:
    layout = Layout("contiguous", length, groups.sp.size)
    q = torch.zeros(1, layout.sizes[groups.sp.rank], heads, 8, requires_grad=True)
    out = METHODS[method].attention(q, q, q, what=AttentionSpec(), where=Where(groups, layout))
    out.sum().backward()


def shape(groups: Groups, wrong: bool) -> None:
    dsp.switch(torch.zeros(3 if wrong else 2, 4, 6), 1, 2, length=LENGTH, groups=groups)


def dtype(groups: Groups, wrong: bool) -> None:
    x = torch.zeros(4, 100, dtype=torch.bfloat16 if wrong else torch.float32)
    all_gather(x, 0, Layout("contiguous", LENGTH, groups.sp.size), axis=groups.sp, method="test")


def order(groups: Groups, wrong: bool) -> None:
    layout = Layout("contiguous", LENGTH, groups.sp.size)
    calls: list[Callable[[], object]] = [
        lambda: all_gather(torch.zeros(4, 100), 0, layout, axis=groups.sp, method="test"),
        lambda: reduce_scatter(torch.zeros(LENGTH, 300), 0, layout, axis=groups.sp, method="test"),
    ]
    for call in reversed(calls) if wrong else calls:
        call()


def absence(groups: Groups, wrong: bool) -> None:
    if not wrong:
        attend(groups)


def method(groups: Groups, wrong: bool) -> None:
    name: Any = "ring" if wrong else "ulysses"
    attend(Groups.build(SequenceParallelConfig(method=name, size=2)), method=name)


def length(groups: Groups, wrong: bool) -> None:
    attend(groups, length=12 if wrong else LENGTH)


def heads(groups: Groups, wrong: bool) -> None:
    attend(groups, heads=8 if wrong else HEADS)


def config(groups: Groups, wrong: bool) -> None:
    sizes: dict[str, Any] = {"ulysses_size": 1, "ring_size": 2} if wrong else {"ulysses_size": 2, "ring_size": 1}
    attend(Groups.build(SequenceParallelConfig(method="usp", size=2, **sizes)), method="usp")


def error(groups: Groups, wrong: bool) -> None:
    if wrong:
        raise ValueError("the learning rate is blue")
    attend(groups)


def death(groups: Groups, wrong: bool) -> None:
    if wrong:
        os._exit(7)
    attend(groups)


def hang(groups: Groups, wrong: bool) -> None:
    if wrong:
        time.sleep(600)
    attend(groups)


KINDS = {
    kind.__name__: kind for kind in (shape, dtype, order, absence, method, length, heads, config, error, death, hang)
}


def main() -> None:
    """Disagrees."""
    _, seconds, kind = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(seconds=float(seconds)))
    groups = Groups.build(SequenceParallelConfig(method="ulysses", size=2))
    attend(groups)
    for _ in range(STEPS):
        KINDS[kind](groups, dist.get_rank() == 1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
