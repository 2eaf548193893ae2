"""Packed batches: short documents live whole on one rank where that is balanced, and the rest is cut in zigzag."""

from __future__ import annotations

import copy
import pickle
from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from counted_lines import lines
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dsp_plugin import Layout, MaskSpec
from dsp_plugin.layout.placement import TILE
from dsp_plugin.layout.whole import MOST_OVER
from dsp_plugin.methods.ring import schedule_of


@st.composite
def packed(draw, least=1) -> tuple[tuple[int, ...], int, int]:
    """Borders of documents of long-tailed lengths, empty ones among them, a size, and below what they stay whole."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 120))
    lengths = {
        "lognormal": lambda: random.lognormal(3, draw(st.sampled_from([0.3, 1.0, 2.0])), count),
        "pareto": lambda: 5 * random.pareto(draw(st.sampled_from([0.9, 1.5, 3.0])), count),
        "equal": lambda: np.full(count, random.integers(1, 60)),
        "few long": lambda: np.where(random.random(count) < 0.05, 2000, 9) * random.random(count),
    }[draw(st.sampled_from(["lognormal", "pareto", "equal", "few long"]))]()
    borders = (0, *accumulate(np.minimum(lengths, 20_000).astype(int).tolist()))
    return borders, draw(st.integers(least, 9)), draw(st.sampled_from([2, 17, 64, 300, 10_000]))


def pairs(layout: Layout, borders: tuple[int, ...], causal: bool) -> list[int]:
    """By rank, how many keys its queries see, one query after the other."""
    starts, ends = (np.array(borders[part]) for part in (slice(None, -1), slice(1, None)))
    found = []
    for rank in range(layout.size):
        positions = layout.runs(rank).positions()
        document = np.searchsorted(ends, positions, side="right")
        seen = positions - starts[document] + 1 if causal else (ends - starts)[document]
        found.append(int(seen.sum()))
    return found


@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=packed())
def test_tokens_are_equal_and_pairs_within_the_stated_bound(case):
    borders, size, below = case
    layout = Layout("zigzag", borders[-1], size, documents=borders, whole_below=below)
    cut = Layout("zigzag", borders[-1], size, documents=borders)
    positions = np.concatenate([layout.runs(rank).positions() for rank in range(size)])
    assert np.array_equal(np.sort(positions), np.arange(borders[-1]))
    assert list(layout.sizes) == [len(layout.runs(rank).positions()) for rank in range(size)]
    assert max(layout.sizes) - min(layout.sizes) <= 1
    for causal in (True, False):
        found = pairs(layout, borders, causal)
        over = max(found) * size * MOST_OVER <= sum(found) * (MOST_OVER + 1)
        assert over or all(layout.spans(rank) == cut.spans(rank) for rank in range(size))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=packed(least=2))
def test_no_more_short_documents_are_cut_than_ranks_need_for_equal_tokens(case):
    borders, size, below = case
    layout = Layout("zigzag", borders[-1], size, documents=borders, whole_below=below)
    holders = np.empty(borders[-1], dtype=np.int64)
    for rank in range(size):
        assert np.array_equal(np.sort(layout.runs(rank).positions()), layout.runs(rank).positions())
        holders[layout.runs(rank).positions()] = rank
    lengths = np.diff(borders)
    on = np.array([len(set(holders[a:b].tolist())) for a, b in pairwise(borders)], dtype=np.int64)
    # The longest that lies whole: up to it, all are whole but those cut for equal tokens.
    longest = lengths[(on == 1) & (lengths > 2 * size)].max(initial=0)
    beyond = [n for n, ranks in zip(lengths, on, strict=True) if 2 * size < n <= longest and ranks > 1]
    assert len(beyond) <= size - 1
    assert longest < below


@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_ring_sends_less_in_fewer_calls_than_where_every_document_is_cut(size):
    random = np.random.default_rng(size)
    borders = (0, *accumulate((1 + random.lognormal(4, 1, 200)).astype(int).tolist()))
    mask = MaskSpec(causal=True, cu_seqlens=borders)
    whole = Layout.of_documents("zigzag", borders[-1], size, borders)
    cut = Layout("zigzag", borders[-1], size, documents=borders)
    sent, calls = {}, {}
    for layout in (whole, cut):
        schedule = schedule_of(layout, mask)
        sent[layout] = sum(schedule.key_tokens_sent(rank) for rank in range(size))
        calls[layout] = sum(len(hop.work) for rank in range(size) for hop in schedule.hops(rank))
    assert sent[whole] * 3 < sent[cut]
    assert calls[whole] * 3 < calls[cut]


def test_a_document_stays_whole_where_its_runs_would_be_shorter_than_a_tile():
    size = 2
    short, long = 2 * size * TILE - 1, 2 * size * TILE
    borders = (0, *accumulate([short] * 4 + [long] * 2))
    layout = Layout.of_documents("zigzag", borders[-1], size, borders)
    assert layout.whole_below == long
    for start, stop in pairwise(borders[:5]):
        assert sum(any(start in run and stop - 1 in run for run in layout.spans(rank)) for rank in range(size)) == 1
    run = long // 4
    assert range(borders[4], borders[4] + run) in layout.spans(0)
    assert range(borders[4] + run, borders[4] + 2 * run) in layout.spans(1)
    assert Layout.of_documents("contiguous", 8, 2, (0, 3, 8)) == Layout("contiguous", 8, 2)
    assert Layout.of_documents("zigzag", 8, 2, None) == Layout("zigzag", 8, 2)


def test_one_long_document_among_short_ones_is_cut_as_no_rank_can_hold_it_in_balance():
    borders = (0, 2000, *accumulate([250] * 80, initial=2250))
    layout = Layout("zigzag", borders[-1], 8, documents=borders, whole_below=2048)
    first = [sum(len(range(max(run.start, 0), min(run.stop, 2000))) for run in layout.spans(r)) for r in range(8)]
    assert first == [250] * 8
    assert all(len(layout.spans(rank)) < 16 for rank in range(8))


def test_layouts_and_masks_are_values_that_hash_once():
    borders = (0, 3, 50, 64)
    for make in (
        lambda: Layout("zigzag", 64, 2, documents=tuple(int(border) for border in np.array(borders)), whole_below=9),
        lambda: MaskSpec(causal=True, window=(3, None), cu_seqlens=tuple(int(border) for border in np.array(borders))),
    ):
        one, other = make(), make()
        assert one is not other
        assert one == other
        assert hash(one) == hash(other)
        assert one != object()
        for again in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert again == one
            assert "_hash" not in vars(again)
    assert Layout("zigzag", 64, 2, documents=borders) != Layout("zigzag", 64, 2, documents=borders, whole_below=9)
    assert MaskSpec(cu_seqlens=borders) != MaskSpec(causal=True, cu_seqlens=borders)


def borders_of(documents: int) -> tuple[int, ...]:
    lengths = np.random.default_rng(documents).lognormal(0, 1, documents)
    return (0, *accumulate((1 + 200 * lengths).astype(int).tolist()))


def test_what_a_new_batch_costs_the_host_does_not_grow_with_its_documents():
    """Of the documents that are dealt by load, 32 rounds of P, the count is the same from there on."""

    def once(documents, below):
        borders = borders_of(documents)

        def work():
            layout = Layout("zigzag", borders[-1], 8, documents=borders, whole_below=below)
            assert len(layout.sizes) == 8
            for rank in range(8):
                layout.runs(rank)
            hash((layout, MaskSpec(causal=True, cu_seqlens=borders)))

        return lines(work)

    for below in (0, 2048):
        once(600, below)  # What the first use of a module costs is not counted.
        few, many = once(600, below), once(2400, below)
        assert 50 < few < 4000, (below, few)
        # How many hand documents on to make tokens equal differs a little.
        assert many < 1.2 * few, (below, few, many)


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_thousands_of_runs_are_copied_in_one_launch_by_an_index_that_stays():
    borders = borders_of(600)
    layout = Layout.of_documents("zigzag", borders[-1], 4, borders)
    x = torch.randn(2, layout.length, 3)
    shards = [layout.shard(x, 1, rank) for rank in range(4)]
    assert torch.equal(layout.unshard(shards, 1), x)
    assert layout.position_ids(1).tolist() == [position for run in layout.spans(1) for position in run]
    with Launches() as seen:
        again = layout.shard(x, 1, 2), layout.position_ids(2), layout.unshard(shards, -2)
    assert seen.names == ["index_select", "clone", "cat", "index_select"]
    assert torch.equal(again[0], shards[2])
    # What a caller does with its positions is its own affair.
    again[1].zero_()
    assert layout.position_ids(2).any()
