"""Packing for an all-to-all, and putting together what came: all ranks of a world in one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsp_plugin import Layout
from dsp_plugin.comm.routes import Route, assembled, pack
from dsp_plugin.layout import shard_ranges

RANKS = 4


class Copies(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


def through(tensors: list[Tensor], layout: Layout, heads: list[tuple[range, ...]]) -> tuple[list[Any], int]:
    """By rank what arrives, and the copies that one rank made."""
    spans = tuple(layout.spans(rank) for rank in range(RANKS))
    routes = [Route(2, 1, tuple((run,) for run in of), spans) for of in heads]
    axes: list[Any] = [SimpleNamespace(size=RANKS, rank=rank) for rank in range(RANKS)]
    with Copies() as copies:
        packed = [pack([layout.shard(x, 1, axis.rank) for x in tensors], routes, axis) for axis in axes]
        found = []
        for rank, mine in enumerate(packed):
            received = torch.cat([from_peer.buffer.split(from_peer.send_counts)[rank] for from_peer in packed])
            found.append(assembled(received, mine.blocks(received), routes))
    return found, copies.count // RANKS


@pytest.mark.parametrize("kind", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("length", [16, 19])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kv_heads", ["own", "shared", "of two ranks", "of one rank"])
def test_every_rank_gets_its_heads_of_all_tokens(kind: Any, length: int, batch: int, kv_heads: str) -> None:
    keys = {
        "own": shard_ranges(4, RANKS),
        "shared": (range(1),) * RANKS,
        "of two ranks": (range(1), range(1), range(1, 2), range(1, 2)),
        "of one rank": (range(2), range(0), range(0), range(0)),
    }[kv_heads]
    # Some heads of each rank's, as in a round.
    queries = tuple(range(start, start + 2) for start in range(1, 17, 4))
    q, k = torch.randn(batch, length, 16, 3), torch.randn(batch, length, 4, 3)
    found, copies = through([q, k], Layout(kind, length, RANKS), [queries, keys])
    for rank, (mine, of_kv) in enumerate(found):
        assert torch.equal(mine, q[:, :, queries[rank].start : queries[rank].stop])
        assert torch.equal(of_kv, k[:, :, keys[rank].start : keys[rank].stop])
    if batch == 2 and length == 16 and kind != "zigzag" and kv_heads in ("own", "shared"):
        assert copies == 4, "a tensor is packed in one copy and unpacked in one, whatever the ranks"
