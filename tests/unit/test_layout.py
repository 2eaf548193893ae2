"""Layouts: who holds which tokens, for any length and size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsp_plugin import Layout, SequenceParallelConfigError
from dsp_plugin.layout import LAYOUTS, shard_ranges, shard_sizes

lengths, sizes, kinds = st.integers(0, 40), st.integers(1, 9), st.sampled_from(LAYOUTS)


@st.composite
def explicit_layouts(draw) -> Layout:
    return Layout.of_sizes(draw(st.lists(st.integers(0, 7), min_size=1, max_size=6)))


layouts = st.one_of(st.builds(Layout, kinds, lengths, sizes), explicit_layouts())


@settings(max_examples=150, deadline=None)
@given(layout=layouts, dim=st.sampled_from([0, 1, 2, -1, -2]))
def test_shards_put_together_are_the_whole(layout, dim):
    shape = [2, 3, 4]
    shape[dim] = layout.length
    x = torch.randn(shape)
    shards = [layout.shard(x, dim, rank) for rank in range(layout.size)]
    assert [shard.shape[dim] for shard in shards] == list(layout.sizes)
    assert sum(layout.sizes) == layout.length
    assert torch.equal(layout.unshard(shards, dim), x)


@settings(max_examples=150, deadline=None)
@given(layout=layouts)
def test_position_ids_are_the_global_positions_of_the_local_tokens(layout):
    tokens = torch.arange(layout.length) * 10
    for rank in range(layout.size):
        positions = layout.position_ids(rank)
        assert positions.dtype == torch.int64
        assert positions.tolist() == [position for run in layout.spans(rank) for position in run]
        assert all(len(run) for run in layout.spans(rank))
        assert torch.equal(layout.shard(tokens, 0, rank), positions * 10)
        assert torch.equal(positions, positions.sort().values)


@settings(deadline=None)
@given(length=st.integers(0, 1000), size=st.integers(1, 64))
def test_sizes_differ_by_at_most_one(length, size):
    for kind in LAYOUTS:
        found = Layout(kind, length, size).sizes
        assert max(found) - min(found) <= 1
        assert kind == "zigzag" or list(found) == sorted(found, reverse=True)
    assert shard_sizes(length, size) == Layout("contiguous", length, size).sizes
    assert [position for run in shard_ranges(length, size) for position in run] == list(range(length))


@settings(deadline=None)
@given(quarter=st.integers(1, 20), size=st.integers(1, 9))
def test_zigzag_gives_every_rank_the_same_causal_work(quarter, size):
    layout = Layout("zigzag", 2 * size * quarter, size)
    # A causal query at position p attends to p + 1 keys.
    work = {int((layout.position_ids(rank) + 1).sum()) for rank in range(size)}
    assert len(work) == 1
    contiguous = Layout("contiguous", 2 * size * quarter, size)
    assert len({int((contiguous.position_ids(rank) + 1).sum()) for rank in range(size)}) == size


def test_the_orders_are_the_documented_ones():
    assert [Layout("contiguous", 7, 2).position_ids(rank).tolist() for rank in range(2)] == [[0, 1, 2, 3], [4, 5, 6]]
    assert [Layout("zigzag", 8, 2).position_ids(rank).tolist() for rank in range(2)] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert [Layout("striped", 5, 2).position_ids(rank).tolist() for rank in range(2)] == [[0, 2, 4], [1, 3]]
    assert Layout.of_sizes([1, 0, 4]).spans(1) == ()
    assert Layout.of_sizes([1, 0, 4]).spans(2) == (range(1, 5),)


def test_one_run_is_a_view():
    x = torch.zeros(6, 2)
    Layout("contiguous", 6, 3).shard(x, 0, 1).fill_(1)
    Layout("striped", 6, 3).shard(x, 0, 2).fill_(2)
    assert x[:, 0].tolist() == [0, 0, 2, 1, 0, 2]


def test_a_layout_is_a_value():
    assert Layout("zigzag", 8, 2) == Layout("zigzag", 8, 2)
    assert hash(Layout.of_sizes([3, 1])) == hash(Layout.of_sizes((3, 1)))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Layout("zig", 8, 2), ["layout='zig'", "contiguous, zigzag, striped"]),
        (lambda: Layout("zigzag", 8, 0), ["length=8, size=0", "size >= 1"]),
        (lambda: Layout("zigzag", -1, 2), ["length=-1", "length >= 0"]),
        (lambda: Layout("zigzag", 2.5, 2), ["layout length=2.5", "integer"]),
        (lambda: Layout("zigzag", 8, True), ["layout size=True", "integer"]),
        (lambda: Layout("zigzag", 8, 2**30), ["size=1073741824", "ranks"]),
        (lambda: Layout("zigzag", 8, 2, documents=(0, 3.7, 8)), ["documents=3.7", "integer", "float"]),
        (lambda: Layout("contiguous", 8, 2, (3, 4)), ["explicit_sizes=(3, 4)", "8 tokens", "7 tokens", "of_sizes"]),
        (lambda: Layout("contiguous", 8, 2, (3, 3, 2)), ["2 contiguous runs", "these are 3"]),
        (lambda: Layout("contiguous", 2, 2, (3, -1)), ["explicit_sizes=-1", "between 0 and"]),
        (lambda: Layout("zigzag", 8, 2, (4, 4)), ["zigzag(", "contiguous runs"]),
        (
            lambda: Layout("contiguous", 8, 2).shard(torch.zeros(2, 7), 1, 0),
            ["sequence length=7", "dim 1 of a tensor (2, 7)", "8 tokens", "Pass unsharded tensors"],
        ),
    ],
)
def test_impossible_layouts_are_refused(make, parts):
    with pytest.raises(SequenceParallelConfigError) as refused:
        make()
    for part in parts:
        assert part in str(refused.value)


def test_counts_may_be_numpys_or_tensors():
    layout = Layout("zigzag", torch.tensor(8), np.int64(2), documents=torch.tensor([0, 3, 8]))
    assert layout == Layout("zigzag", 8, 2, documents=(0, 3, 8))
    assert all(type(border) is int for border in layout.documents)
