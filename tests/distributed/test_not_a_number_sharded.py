"""A value that is no number leaves earlier tokens and other documents alone on every rank, by every exchange."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from dsp_plugin import METHODS, Layout, SequenceParallelConfig, SequenceParallelGroups, Where
from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.methods.state_exchange import EXCHANGES
from dsp_plugin.spawn import spawn
from dsp_plugin.verification import Case
from dsp_plugin.verification.linear import draw as drawn

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


# Of two ranks the first has 11 tokens, of three 8: documents that start inside shards and with them, that end with
# them, and that a rank holds nothing but the middle of.
BORDERS = ((0, 5, 11, 22), (0, 3, 18, 22), (0, 8, 15, 22))


def with_gradients(groups: SequenceParallelGroups, inputs: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """This rank's output, state and gradients of a sum over documents and ranks."""
    layout = Layout("contiguous", LENGTH, groups.sp.size)
    whole = {name for name, x in inputs.items() if name == "initial_state" or x.dim() == 1}
    leaves = {
        name: (x if name in whole else layout.shard(x, 1, groups.sp.rank)).clone().requires_grad_()
        for name, x in inputs.items()
    }
    attend: Any = METHODS["lasp"].attention
    out, state = attend(**leaves, **settings, where=Where(groups, layout), output_final_state=True)
    (out.square().sum() + state.square().sum()).backward()
    return {"out": out, "state": state, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def leaks(size: int) -> tuple[int, list[str]]:
    """How often documents were spoilt, and what of others was then not as without."""
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method="lasp", size=size))
    positions = Layout("contiguous", LENGTH, size).position_ids(groups.sp.rank)
    count, found = 0, []
    for decay, exchange, borders in product(DECAYS, EXCHANGES, BORDERS):
        case = Case("lasp", size, length=LENGTH, heads=HEADS, head_dim=WIDTH, decay=decay, states=True, batch=1)
        inputs = {name: x.double() for name, x in drawn(case).items() if name not in ("dout", "dfinal")}
        clean = with_gradients(groups, inputs, exchange=exchange, cu_seqlens=borders)
        everything = [name for name, x in inputs.items() if x.dim() in (3, 4) and name != "initial_state"]
        spoilings = ((["v"], math.inf), (everything, math.nan))
        for (start, stop), (names, value) in product(pairwise(borders), spoilings):
            spoilt = dict(inputs)
            for name in names:
                spoilt[name] = spoilt[name].clone()
                spoilt[name][:, (start + stop) // 2] = value
            got = with_gradients(groups, spoilt, exchange=exchange, cu_seqlens=borders)
            others = (positions < start) | (positions >= stop)
            mine = {"state": not others[-1], "dinitial_state": start == 0 and groups.sp.rank == 0}
            for name, x in got.items():
                if name in mine:
                    same = mine[name] or torch.equal(x, clean[name])
                else:
                    same = x.dim() == 1 or torch.equal(x[:, others], clean[name][:, others])
                if not same:
                    found.append(f"{decay}, {exchange}, {borders}: {names} {value} of {start} to {stop} in {name}")
            count += 1
    return count, found


@pytest.mark.parametrize("size", [2, 3])
def test_other_documents_never_see_it_on_any_rank_nor_do_their_gradients(size: int) -> None:
    for count, found in spawn(leaks, size, size):
        assert count == len(DECAYS) * len(EXCHANGES) * len(BORDERS) * 6
        assert found == []
