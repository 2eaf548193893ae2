"""Rows of a batch that are packed unlike: every method, and a model that says so itself, beside torch's dense masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from attending import Layer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsp_plugin import (
    AttentionSpec,
    Layout,
    MaskSpec,
    SequenceParallelConfig,
    SequenceParallelConfigError,
    SequenceParallelGroups,
    UnsupportedError,
    Where,
    ledger,
    parallelize,
    softmax_attention,
)
from dsp_plugin.config.attention import attention_of
from dsp_plugin.kernels import calls
from dsp_plugin.methods import METHODS, Workload
from dsp_plugin.spawn import spawn
from dsp_plugin.training.recompute import keep_attention

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

ROWS, HEADS, KV_HEADS, DIM = 4, 6, 2, 8
PLACED = (
    ("ring", "zigzag"),
    ("ring", "contiguous"),
    ("ring", "striped"),
    ("ulysses", "contiguous"),
    ("usp", "zigzag"),
    ("lightseq", "contiguous"),
)
Borders = tuple[int, ...]


def random_rows(length: int, seed: int) -> tuple[Borders, ...]:
    """Borders of rows, of which the second and third are alike; empty documents and ones of one token among them."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 4, (ROWS,), generator=generator).tolist()
    rows = [sorted(torch.randint(0, length + 1, (count,), generator=generator).tolist()) for count in counts]
    rows[2] = rows[1]
    return tuple((0, *row, length) for row in rows)


def dense(q: Tensor, k: Tensor, v: Tensor, rows: tuple[Borders, ...], mask: MaskSpec) -> Tensor:
    """``[B, L, H, D]`` by torch's own attention and a mask of all pairs."""
    length = q.shape[1]
    borders = torch.tensor([[sum(border <= at for border in row) for at in range(length)] for row in rows])
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    left, right = mask.band()
    near = (distance >= -(length if left is None else left)) & (distance <= (length if right is None else right))
    seen = (borders[:, :, None] == borders[:, None, :]) & near
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True).transpose(1, 2)


def _tensors(length: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, DIM), (HEADS, DIM))
    return [torch.randn(ROWS, length, *shape, dtype=torch.float64, generator=generator) for shape in shapes]


def _by_methods(size: int) -> int:
    groups: dict[str, SequenceParallelGroups] = {}
    done = 0
    for turn, (method, kind) in enumerate(PLACED):
        config = SequenceParallelConfig(method=method, size=size, layout=kind)
        groups[method] = groups.get(method) or SequenceParallelGroups.build(config)
        for seed, (length, mask) in enumerate(
            ((13, MaskSpec(causal=True)), (17, MaskSpec(causal=True, window=(4, 0))), (8, MaskSpec()))
        ):
            rows, layout = random_rows(length, 10 * turn + seed), Layout(kind, length, size)
            *whole, dout = _tensors(length, seed)
            leaves = [x.clone().requires_grad_() for x in whole]
            expected = dense(*leaves, rows, mask)
            expected.backward(dout)
            rank = groups[method].sp.rank
            mine = [layout.shard(x, 1, rank).contiguous().requires_grad_() for x in whole]
            what = AttentionSpec(mask, cu_seqlens_by_row=rows)
            with ledger() as log:
                out = attention_of(config)(*mine, what=what, where=Where(groups[method], layout))
                out.backward(layout.shard(dout, 1, rank))
            name = f"{method} {kind} {length} {mask.describe()} {rows}"
            torch.testing.assert_close(out, layout.shard(expected, 1, rank), rtol=0, atol=1e-10, msg=name)
            for x, leaf in zip(mine, leaves, strict=True):
                torch.testing.assert_close(x.grad, layout.shard(leaf.grad, 1, rank), rtol=0, atol=1e-10, msg=name)
            assert log.bytes() == _bytes(method, config, layout, rows, mask, rank), name
            done += 1
    return done


def _bytes(method: str, config: Any, layout: Layout, rows: tuple[Borders, ...], mask: MaskSpec, rank: int) -> int:
    """What leaves the rank for each row by itself, in all."""
    total = 0
    for row in rows:
        workload = Workload(
            layout.size,
            HEADS,
            KV_HEADS,
            layout.length,
            1,
            DIM,
            element_size=8,
            layout=layout.kind,
            mask=MaskSpec(mask.causal, mask.window, row),
            ulysses_size=config.ulysses_size,
        )
        total += sum(METHODS[method].wire_bytes(workload, rank))
    return total


def _no_turns(size: int) -> list[int]:
    """How often a rank sends for rows that share their borders, told of them row by row, and in one."""
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method="ulysses", size=size))
    layout, shared = Layout("contiguous", 8, size), (0, 3, 8)
    q, k, v, _ = (layout.shard(x, 1, groups.sp.rank).contiguous() for x in _tensors(8, 0))
    found = []
    for what in (
        AttentionSpec(MaskSpec(causal=True, cu_seqlens=shared)),
        AttentionSpec(MaskSpec(causal=True), cu_seqlens_by_row=(shared,) * ROWS),
    ):
        with ledger() as log:
            METHODS["ulysses"].attention(q, k, v, what=what, where=Where(groups, layout))
        found.append(log.calls())
    return found


class Described(nn.Module):
    """Attention as a model writes that keeps the documents of its rows apart, in windows."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor, borders: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 6, 4)).unbind(2)
        spec = AttentionSpec(MaskSpec(causal=True, window=(5, 0)), cu_seqlens_by_row=borders)
        return self.out(softmax_attention(q, k, v, spec).flatten(2))


class Packed(nn.Module):
    """A language model of such layers; the borders come with the batch and are no sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 24), nn.Linear(24, 11)
        self.layers = nn.ModuleList([Described(), Described()])

    def forward(self, input_ids: Tensor, borders: Any, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x, borders)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten(), ignore_index=-100)


def model() -> Packed:
    torch.manual_seed(0)
    return Packed().double()


def _described(size: int) -> int:
    done = 0
    for method in ("ring", "ulysses", "usp", "lightseq"):
        config = SequenceParallelConfig(
            method=method,
            size=size,
            batch={"input_ids": 1, "labels": 1},
            attention=["layers.*"],
            positions=None,
            loss={"labels": "labels"},
        )
        groups = SequenceParallelGroups.build(config)
        for seed, length in enumerate((17, 8)):
            generator = torch.Generator().manual_seed(seed)
            ids, labels = torch.randint(11, (2, ROWS, length), generator=generator)
            labels[0, :5] = -100
            rows = random_rows(length, seed)
            borders: Any = rows if seed else [torch.tensor(row) for row in rows]
            plain, sharded = model(), model()
            parallelize(sharded, config=config, groups=groups)
            expected, loss = plain(ids, borders, labels), sharded(ids, borders, labels)
            expected.backward()
            loss.backward()
            torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
            for mine, theirs in zip(sharded.parameters(), plain.parameters(), strict=True):
                dist.all_reduce(mine.grad)
                torch.testing.assert_close(mine.grad / size, theirs.grad, rtol=0, atol=1e-10)
            done += 1
        with pytest.raises(SequenceParallelConfigError, match="the borders of 1 rows, and the batch has 4"):
            sharded(ids, rows[:1], labels)
        with pytest.raises(SequenceParallelConfigError, match="the sequence has 8 tokens"):
            sharded(ids, (*rows[:-1], (0, 3)), labels)
    return done


def _all(size: int) -> tuple[int, list[int], int]:
    torch.set_num_threads(1)
    return _by_methods(size), _no_turns(size), _described(size)


@pytest.mark.parametrize("size", [1, 3, *(pytest.param(size, marks=pytest.mark.matrix) for size in (2, 4))])
def test_every_row_keeps_its_documents_apart(size: int) -> None:
    for done, (shared, by_row), models in spawn(_all, size, size, timeout=180):
        assert (done, models) == (18, 8)
        assert shared == by_row


def test_the_local_attention_takes_rows_packed_unlike() -> None:
    rows, mask = random_rows(13, 5), MaskSpec(causal=True)
    q, k, v, dout = _tensors(13, 1)
    leaves, mine = ([x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2))
    expected = dense(*leaves, rows, mask)
    out, lse = softmax_attention(*mine, AttentionSpec(mask, cu_seqlens_by_row=rows), return_lse=True)
    assert lse.shape == (ROWS, HEADS, 13)
    expected.backward(dout)
    out.backward(dout)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    for x, leaf in zip(mine, leaves, strict=True):
        torch.testing.assert_close(x.grad, leaf.grad, rtol=0, atol=1e-10)


def test_dropout_does_not_depend_on_how_rows_are_told() -> None:
    """A row drops what it drops in a batch of rows alike."""
    q, k, v, _ = _tensors(13, 2)
    shared = (0, 5, 13)
    mask, drops = MaskSpec(causal=True), {"dropout_p": 0.4, "dropout_seed": 3}
    expected = softmax_attention(q, k, v, AttentionSpec(MaskSpec(causal=True, cu_seqlens=shared), **drops))
    rows = ((0, 13), shared, shared, (0, 2, 13))
    found = softmax_attention(q, k, v, AttentionSpec(mask, cu_seqlens_by_row=rows, **drops))
    torch.testing.assert_close(found[1:3], expected[1:3], rtol=0, atol=0)


def test_every_row_is_answered_from_the_tape_of_a_checkpointed_stretch() -> None:
    rows, layout = random_rows(13, 7), Layout("zigzag", 13, 1)
    where = Where(SequenceParallelGroups.single(), layout)
    what = AttentionSpec(MaskSpec(causal=True), cu_seqlens_by_row=rows)
    q, k, v, dout = _tensors(13, 4)
    found = []
    for kept in (False, True):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]

        def stretch(*leaves: Tensor) -> Tensor:
            return METHODS["ring"].attention(*(2 * x for x in leaves), what=what, where=where)

        with calls() as counted:
            out = (
                checkpoint(stretch, *leaves, use_reentrant=False, context_fn=keep_attention)
                if kept
                else stretch(*leaves)
            )
            out.backward(dout)
        found.append(([x.grad for x in leaves], counted.forward))
    (expected, once), (kept, twice) = found
    assert twice == once
    for x, leaf in zip(kept, expected, strict=True):
        torch.testing.assert_close(x, leaf, rtol=0, atol=0)


def test_borders_are_given_once() -> None:
    with pytest.raises(SequenceParallelConfigError, match="the mask has borders for all rows"):
        AttentionSpec(MaskSpec(cu_seqlens=(0, 4)), cu_seqlens_by_row=((0, 4),))
    with pytest.raises(SequenceParallelConfigError, match="document borders start at 0"):
        AttentionSpec(cu_seqlens_by_row=((0, 4), (1, 4)))


def test_a_dense_mask_is_refused_with_what_serves_documents() -> None:
    config = SequenceParallelConfig(
        method="ring", size=1, batch={"x": 1}, attention=["attn"], positions=None, gather_output=1
    )
    layer = Layer(24, 6, causal=True)
    masked = lambda *args, **kwargs: F.scaled_dot_product_attention(*args, attn_mask=torch.ones(8, 8))  # noqa: E731
    layer.attn.forward = lambda x: masked(*(x[:, None] for _ in range(3)))[:, 0]
    parallelize(layer, config=config, groups=SequenceParallelGroups.single())
    with pytest.raises(UnsupportedError, match=r"dsp_plugin.softmax_attention with AttentionSpec.*cu_seqlens_by_row"):
        layer(torch.randn(2, 8, 24))
