"""Claims about the calls of a ring's hops: which (query, key) pairs they compute, and how few they are."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from test_ring_schedule import placements, play, positions, schedule_of

from dsp_plugin import Layout, MaskSpec
from dsp_plugin.kernels.reference import dense_mask
from dsp_plugin.methods.places import Places
from dsp_plugin.methods.ring_schedule import RingSchedule
from dsp_plugin.methods.usp import gathered_tokens

CAUSAL, FULL = MaskSpec(causal=True), MaskSpec()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(placement=placements())
def test_calls_compute_every_visible_pair_once_with_keys_that_are_there(placement):
    layout, mask = placement
    schedule, local = schedule_of(layout, mask), positions(layout)
    history, _ = play(schedule, local)
    computed = torch.zeros(layout.length, layout.length, dtype=torch.int64)
    for rank in range(layout.size):
        for hop, held in zip(schedule.hops(rank), history[rank], strict=True):
            for call in hop.calls:
                queries = [local[rank][index] for index in call.q.index()]
                keys = torch.tensor([held[index] for index in call.k.index()])
                for part in call.what.parts:
                    seen = part.visible("cpu")
                    assert seen.any(1).all(), "a query of a call that sees nothing"
                    for row, position in enumerate(queries[part.q]):
                        computed[position, keys[part.k][seen[row]]] += 1
    everything = torch.arange(layout.length)
    assert torch.equal(computed, dense_mask(mask, everything, everything).long())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(placement=placements())
def test_later_calls_of_the_same_queries_are_announced(placement):
    schedule = schedule_of(*placement)
    for rank in range(schedule.size):
        calls = [call for hop in schedule.hops(rank) for call in hop.calls]
        left = Counter(call.q for call in calls)
        for call in calls:
            left[call.q] -= 1
            assert call.again == (left[call.q] > 0)
        apart = {tuple(call.q.index().tolist()) for call in calls}
        assert len(apart) == len({id(call.q) for call in calls}), "one object for the same queries"


def calls_by_hop(schedule: RingSchedule, rank: int) -> list[int]:
    return [len(hop.calls) for hop in schedule.hops(rank)]


@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("length", [64, 61, 9])
def test_a_hop_of_a_causal_mask_or_none_is_one_call(kind, mask, length):
    for size in (2, 3, 4, 8):
        schedule = schedule_of(Layout(kind, length, size), mask)
        for rank in range(size):
            assert max(calls_by_hop(schedule, rank)) <= 1
    assert calls_by_hop(schedule_of(Layout("zigzag", 64, 8), CAUSAL), 3) == [1] * 8


@pytest.mark.parametrize("order", ["documents", "whole", "contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("window", [None, (200, 0)], ids=["no window", "a window longer than documents"])
def test_a_hop_of_packed_documents_is_one_call_however_many_there_are(order, window):
    borders = (0, *accumulate(1 + 37 * index % 97 for index in range(60)))
    layouts = {
        "documents": Layout("zigzag", borders[-1], 4, documents=borders),
        "whole": Layout("zigzag", borders[-1], 4, documents=borders, whole_below=50),
    }
    layout = layouts.get(order) or Layout(order, borders[-1], 4)
    for causal in (True, False):
        mask = MaskSpec(causal=causal, window=window, cu_seqlens=borders)
        schedule = schedule_of(layout, mask)
        for rank in range(4):
            assert max(calls_by_hop(schedule, rank)) == 1
    (home, *_) = schedule.hops(2)[0].calls
    assert home.q.covers(layout.sizes[2])


def test_two_level_rings_have_one_call_a_hop():
    layout = Layout("zigzag", 16 * 5 + 3, 8)
    schedule = RingSchedule([gathered_tokens(layout, (rank, rank + 1))[0] for rank in range(0, 8, 2)], CAUSAL)
    for rank in range(4):
        assert calls_by_hop(schedule, rank) == [1] * 4


def test_a_window_over_runs_takes_three_calls_at_most():
    for window in (3, 8, 11, 17, 30):
        for length in (64, 67):
            schedule = schedule_of(Layout("zigzag", length, 4), MaskSpec(causal=True, window=(window, 0)))
            assert max(n for rank in range(4) for n in calls_by_hop(schedule, rank)) <= 3


def test_places_pick_put_and_add_what_an_index_does():
    x = torch.arange(2 * 40 * 3.0).view(2, 40, 3)
    for starts, stops in ([[0], [40]], [[3], [9]], [[1, 4], [4, 6]], [[0, 5, 9], [2, 7, 10]], [range(0, 40, 3)] * 2):
        starts, stops = np.array(starts), np.array(stops)
        stops = stops + 1 if (stops == starts).all() else stops
        places = Places(starts, stops)
        index = torch.tensor([i for a, b in zip(starts, stops, strict=True) for i in range(a, b)])
        assert places.index().tolist() == index.tolist()
        assert places.count == len(index)
        assert torch.equal(places.pick(x), x[:, index])
        new = torch.rand(2, len(index), 3)
        into, expected = x.clone(), x.clone()
        expected[:, index] += new
        places.add_(into, new)
        assert torch.equal(into, expected)
        expected[:, index] = new
        places.put_(into, new)
        assert torch.equal(into, expected)
    joined = Places(np.array([0, 4, 9]), np.array([4, 6, 10]))
    assert list(joined) == [slice(0, 6), slice(9, 10)]
