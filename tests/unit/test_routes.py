"""Packing for an all-to-all, and putting together what came: all ranks of a world in one process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsp_plugin import Layout
from dsp_plugin.comm.plan import pack
from dsp_plugin.comm.routes import Route
from dsp_plugin.kernels.kernel import laid_alike
from dsp_plugin.layout import shard_ranges

RANKS = 4


class Copies(TorchDispatchMode):
    """Counts the operators that move something."""

    NAMES = ("copy_", "cat", "clone", "index_select", "index_copy_", "index_add_", "sum", "_to_copy", "zero_")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func._schema.name.removeprefix("aten::") in self.NAMES
        return func(*args, **(kwargs or {}))


def exchanged(tensors: list[list[Tensor]], routes: list[Route]) -> tuple[list[list[Tensor]], int]:
    """By rank what arrives of what each rank has, and the copies that one rank made."""
    axes: list[Any] = [SimpleNamespace(size=RANKS, rank=rank) for rank in range(RANKS)]
    with Copies() as copies:
        packed = [pack(mine, routes, axis) for mine, axis in zip(tensors, axes, strict=True)]
    found = []
    for rank, mine in enumerate(packed):
        received, room = mine.plan.room(mine.buffer)
        torch.cat([one.buffer.split(one.plan.send_counts)[rank] for one in packed], out=received)
        with Copies() as more:
            found.append(mine.plan.unpack(room))
        copies.count += more.count + bool(mine.plan.arriving.behind)
    return found, copies.count // RANKS


def through(tensors: list[Tensor], layout: Layout, heads: list[tuple[range, ...]]) -> tuple[list[Any], list[Any], int]:
    """By rank what arrives, what comes of it on its way back, and the copies that one rank made."""
    spans = tuple(layout.spans(rank) for rank in range(RANKS))
    routes = [Route(2, 1, tuple((run,) for run in of), spans) for of in heads]
    local = [[layout.shard(x, 1, rank) for x in tensors] for rank in range(RANKS)]
    found, there = exchanged(local, routes)
    back, home = exchanged(found, [route.inverse() for route in routes])
    return found, back, there + home


@pytest.mark.parametrize("kind", ["contiguous", "striped", "zigzag"])
@pytest.mark.parametrize("length", [16, 19])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kv_heads", ["own", "shared", "of two ranks", "of one rank"])
@pytest.mark.parametrize("value_dim", [3, 2])
def test_every_rank_gets_its_heads_of_all_tokens_and_they_their_sums(
    kind: Any, length: int, batch: int, kv_heads: str, value_dim: int
) -> None:
    keys = {
        "own": shard_ranges(4, RANKS),
        "shared": (range(1),) * RANKS,
        "of two ranks": (range(1), range(1), range(1, 2), range(1, 2)),
        "of one rank": (range(2), range(0), range(0), range(0)),
    }[kv_heads]
    # Some heads of each rank's, as in a round.
    queries = tuple(range(start, start + 2) for start in range(1, 17, 4))
    q, k = torch.randn(batch, length, 16, 3), torch.randn(batch, length, 4, value_dim)
    layout = Layout(kind, length, RANKS)
    found, back, copies = through([q, k], layout, [queries, keys])
    for rank, (mine, of_kv) in enumerate(found):
        assert torch.equal(mine, q[:, :, queries[rank].start : queries[rank].stop])
        assert torch.equal(of_kv, k[:, :, keys[rank].start : keys[rank].stop])
    sent = sorted({head for run in queries for head in run})
    shared = torch.tensor([sum(head in run for run in keys) for head in sorted({x for run in keys for x in run})])
    for rank, (of_q, of_kv) in enumerate(back):
        assert torch.equal(of_q, layout.shard(q[:, :, sent], 1, rank))
        torch.testing.assert_close(of_kv, layout.shard(k[:, :, : len(shared)] * shared[:, None], 1, rank))
    # Tensors are packed in one copy, or in two; those that lie as the buffer does are not unpacked.
    even = kv_heads != "of one rank"
    ordered = kind != "contiguous"
    assert copies <= (1 if even else 2) + ordered + (1 + ordered) + (1 if kv_heads == "own" else 2), copies


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_that_lie_as_the_tensors_arrived_are_sent_as_they_lie(batch: int) -> None:
    layout, spans = Layout("contiguous", 19, RANKS), shard_ranges(19, RANKS)
    runs = tuple((run,) for run in spans)
    routes = [Route(2, 1, tuple((run,) for run in shard_ranges(of, RANKS)), runs) for of in (8, 4, 4)]
    whole = [torch.randn(batch, 19, heads, dim) for heads, dim in ((8, 6), (4, 6), (4, 2))]
    found, _ = exchanged([[layout.shard(x, 1, rank) for x in whole] for rank in range(RANKS)], routes)
    axis: Any = SimpleNamespace(size=RANKS, rank=1)
    gradients = laid_alike(*found[1])
    for gradient, x in zip(gradients, found[1], strict=True):
        assert gradient.stride() == x.stride()
        gradient.copy_(x * 2)
    back = [route.inverse() for route in routes]
    with Copies() as copies:
        packed = pack(gradients, back, axis)
    assert copies.count == 0
    assert packed.buffer.data_ptr() == gradients[0].data_ptr()
    assert torch.equal(packed.buffer, pack([x.clone() for x in gradients], back, axis).buffer)
    alone = laid_alike(*(x.clone() for x in gradients))
    assert all(x.is_contiguous() for x in alone)
    assert len({x.untyped_storage().data_ptr() for x in alone}) == 3


def test_gradients_of_tensors_that_are_one_have_room_of_their_own() -> None:
    # As many elements as lie between their ends, for what is there twice makes up for the hole.
    buffer = torch.randn(12)
    q, kv = buffer[:4].view(1, 1, 2, 2), buffer[8:].view(1, 1, 2, 2)
    gradients = laid_alike(q, kv, kv)
    for value, gradient in enumerate(gradients):
        gradient.fill_(value)
    assert [gradient.unique().tolist() for gradient in gradients] == [[0.0], [1.0], [2.0]]
