"""A value that is no number leaves earlier tokens as they are on every rank, by every exchange of states."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor

from dsp_plugin import METHODS, Layout, SequenceParallelConfig, SequenceParallelGroups, Where
from dsp_plugin.spawn import spawn

LENGTH, HEADS, WIDTH = 22, 2, 4


def outputs(groups: SequenceParallelGroups, layout: Layout, decay: bool, exchange: str, at: int | None) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, LENGTH, HEADS, WIDTH, generator=draw, dtype=torch.float64) for _ in range(3))
    g = -torch.rand(1, LENGTH, HEADS, generator=draw, dtype=torch.float64) if decay else None
    if at is not None:
        v[0, at] = math.nan
    own = [None if x is None else layout.shard(x, 1, groups.sp.rank) for x in (q, k, v, g)]
    attend: Any = METHODS["lasp"].attention
    return attend(*own, exchange=exchange, where=Where(groups, layout))


def compared() -> dict[str, list[bool]]:
    """For every case whether tokens before are as without it, and those from it on are no numbers."""
    config = SequenceParallelConfig(method="lasp", size=2)
    groups = SequenceParallelGroups.build(config)
    found = {}
    cases = product(("contiguous", "zigzag"), (False, True), ("ring", "allgather", "scan"), (4, 9, 13, 20))
    for kind, decay, exchange, at in cases:
        layout = Layout(kind, LENGTH, 2)
        out = outputs(groups, layout, decay, exchange, at)
        wanted = outputs(groups, layout, decay, exchange, None)
        before = layout.position_ids(groups.sp.rank) < at
        same = torch.equal(out[:, before], wanted[:, before])
        found[f"{kind}, decay {decay}, {exchange}, at {at}"] = [same, bool(out[:, ~before].isnan().all())]
    return found


def test_earlier_tokens_never_see_it_on_any_rank() -> None:
    for found in spawn(compared, 2):
        assert len(found) == 48
        assert [case for case, outcome in found.items() if outcome != [True, True]] == []
