"""Claims about LightSeq's balanced schedule, played through in pure Python, for odd and even sizes."""

from __future__ import annotations

from collections import Counter

import pytest

from dsp_plugin import Layout, MaskSpec
from dsp_plugin.kernels.blocks import blocks
from dsp_plugin.layout import shard_ranges
from dsp_plugin.methods import METHODS, Workload
from dsp_plugin.methods.lightseq import Schedule

SIZES = range(1, 10)
CAUSAL = MaskSpec(causal=True)


def schedule_of(size: int, length: int, mask: MaskSpec = CAUSAL) -> Schedule:
    return Schedule(shard_ranges(length, size), mask)


def masks(length: int) -> list[MaskSpec]:
    third = length // 3
    return [
        CAUSAL,
        MaskSpec(causal=True, window=(length // 4, 0)),
        MaskSpec(causal=True, window=(0, 0)),
        MaskSpec(causal=True, cu_seqlens=(0, third, third + 1, length)),
        MaskSpec(causal=True, window=(length // 5, None), cu_seqlens=(0, third, length)),
    ]


@pytest.mark.parametrize("size", SIZES)
def test_every_block_is_computed_exactly_once_by_an_owner_of_its_queries_or_keys(size):
    for length in (4 * size + 1, size, max(size - 1, 1)):
        for mask in masks(length):
            schedule = schedule_of(size, length, mask)
            done = Counter()
            for step in range(schedule.steps + 1):
                for rank in range(size):
                    block = schedule.block(step, rank)
                    if block is not None:
                        assert rank in block
                        done[block] += 1
            needed = {
                (q, k) for q in range(size) for k in range(size) if blocks(mask, schedule.runs[q], schedule.runs[k])
            }
            assert done == Counter(needed), (length, mask)


@pytest.mark.parametrize("size", SIZES)
def test_the_idle_share_is_the_bound_of_the_schedule(size):
    """P(P+1)/2 blocks need (P+1)/2 steps of P ranks: that divides for odd P; for even P half a step is left over."""
    schedule = schedule_of(size, 3 * size)
    blocks_in_all, slots = size * (size + 1) // 2, (schedule.steps + 1) * size
    fewest_steps = -(-blocks_in_all // size)
    assert schedule.steps + 1 == fewest_steps
    assert schedule.idle_share() == (slots - blocks_in_all) / slots
    assert schedule.idle_share() == pytest.approx(0 if size % 2 else 1 / (size + 2), abs=1e-15)


@pytest.mark.parametrize("size", SIZES)
def test_what_is_sent_in_a_step_is_what_a_block_of_that_step_reads(size):
    for mask in masks(4 * size + 1):
        schedule = schedule_of(size, 4 * size + 1, mask)
        for step in range(1, schedule.steps + 1):
            sent, read = set(), set()
            for rank in range(size):
                if (user := schedule.key_user(step, rank)) is not None:
                    sent.add(("keys", rank, user))
                if (helper := schedule.helper(step, rank)) is not None:
                    sent.add(("queries", rank, helper))
                q, k = schedule.block(step, rank) or (rank, rank)
                if k != rank:
                    read.add(("keys", k, rank))
                if q != rank:
                    read.add(("queries", q, rank))
            assert sent == read, (mask, step)
            assert not any(source == target for _, source, target in sent)


@pytest.mark.parametrize("size", SIZES)
def test_forward_and_backward_move_three_shards_of_n_d_per_other_rank(size):
    """3(P-1)/P N d e per rank for as many kv heads as heads, a third of it forward, beside the log-sum-exps."""
    batch, heads, dim, length = 2, 4, 8, 5 * size
    shard = batch * (length // size) * heads * dim * 4
    workload = Workload(size, heads, heads, length, batch, dim, mask=CAUSAL)
    sent = [METHODS["lightseq"].wire_bytes(workload, rank) for rank in range(size)]
    schedule = schedule_of(size, length)
    helped = sum(
        schedule.helper(step, rank) is not None for step in range(1, schedule.steps + 1) for rank in range(size)
    )
    lse = batch * (length // size) * heads * 4
    assert sum(b.forward for b in sent) == (size - 1) * size * shard + helped * lse
    assert sum(b.backward for b in sent) == 2 * (size - 1) * size * shard + helped * lse
    # Half of the plain ring, forward.
    full = Workload(size, heads, heads, length, batch, dim)
    ring = sum(METHODS["ring"].wire_bytes(full, rank).forward for rank in range(size))
    assert 2 * (sum(b.forward for b in sent) - helped * lse) == ring


def test_ranks_without_tokens_neither_compute_nor_send():
    layout = Layout("contiguous", 3, 5)
    schedule = Schedule(tuple(next(iter(layout.spans(rank)), range(0)) for rank in range(5)), CAUSAL)
    for step in range(schedule.steps + 1):
        for rank in (3, 4):
            assert schedule.key_user(step, rank) is None if step else True
            assert schedule.helper(step, rank) is None if step else True
        assert all(set(block) <= {0, 1, 2} for rank in range(5) if (block := schedule.block(step, rank)))
