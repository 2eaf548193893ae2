"""Heads dealt out to rounds, and budgets that choose how many: all shapes, without a world."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError
from dsp_plugin.methods.head_partition import head_partition
from dsp_plugin.methods.head_rounds import RoundBudget, check, choose, head_rounds, most_rounds

SHAPES = [
    (heads, kv_heads, ranks)
    for kv_heads, group, ranks in product(range(1, 7), range(1, 6), range(1, 7))
    if (heads := kv_heads * group) >= ranks
]


@pytest.mark.parametrize("whole_groups", [False, True])
def test_rounds_share_out_every_head_once_and_bring_every_key_once(whole_groups: bool) -> None:
    for shape in SHAPES:
        part = head_partition(*shape)
        for count in range(1, most_rounds(part, whole_groups=whole_groups) + 1):
            rounds = head_rounds(part, count)
            for rank in range(part.ranks):
                queries = [rounds.queries[index][rank] for index in range(count)]
                assert [head for run in queries for head in run] == list(part.queries[rank]), (shape, count)
                assert all(map(len, queries))
                brought = [head for index in range(count) for head in rounds.arriving[index][rank]]
                assert brought == list(part.keys[rank]), (shape, count)
                for index in range(count):
                    served = rounds.queries_per_key(index, rank)
                    assert sum(served) == len(queries[index])
                    assert len(served) == len(rounds.keys[index][rank])
                    assert rounds.arriving[index][rank] in (rounds.keys[index][rank], range(0))
                    if not rounds.arriving[index][rank]:
                        assert not whole_groups
                        assert rounds.keys[index][rank] == rounds.keys[index - 1][rank]


def test_whole_groups_are_dealt_as_evenly_as_they_go() -> None:
    # 8 groups of 4 on a rank of its own: 3, 3 and 2 of them.
    assert [len(by_rank[0]) for by_rank in head_rounds(head_partition(32, 8, 1), 3).queries] == [12, 12, 8]
    # Groups of 1, 4 and 3, of which the largest is cut first.
    part = head_partition(16, 4, 2)
    assert [len(by_rank[0]) for by_rank in head_rounds(part, 3).queries] == [2, 2, 4]
    assert [len(by_rank[0]) for by_rank in head_rounds(part, 8).queries] == [1] * 8


def test_more_rounds_than_heads_are_refused_with_those_of_the_emptiest_rank() -> None:
    uneven = head_partition(6, 2, 3)
    assert [len(heads) for heads in uneven.queries] == [2, 1, 3]
    with pytest.raises(SequenceParallelConfigError) as failure:
        check(2, uneven, whole_groups=False)
    said = str(failure.value)
    assert "memory.attention_rounds=2: 6 query heads over ulysses_size=3 leave a rank 1" in said
    assert "Set it to 1 or less" in said
    with pytest.raises(SequenceParallelConfigError, match=r"2 key/value heads .* leave a rank 1, .* round the ring"):
        check(2, head_partition(8, 2, 2), whole_groups=True)


def chosen(setting: int | RoundBudget, heads: int = 32, kv_heads: int = 8, ranks: int = 2, batch: int = 2) -> int:
    q, v = torch.empty(batch, 3, heads, 16, dtype=torch.bfloat16), torch.empty(batch, 3, kv_heads, 8)
    return choose(setting, q, v, head_partition(heads, kv_heads, ranks), 100, whole_groups=False).count


def test_a_budget_is_kept_by_as_few_rounds_as_will_do() -> None:
    # 2 rows of 100 tokens of 2 bytes, times (16 + 8) for a query head with its output, and for a key/value head.
    head = 2 * 100 * 2 * 24
    for rounds, widest in ((1, 16 + 4), (2, 8 + 2), (4, 4 + 1), (8, 2 + 1), (16, 1 + 1)):
        assert chosen(RoundBudget(head * widest)) == rounds
        if rounds < 16:
            assert chosen(RoundBudget(head * widest - 1)) > rounds
    assert chosen(RoundBudget(2**60)) == 1
    assert chosen(RoundBudget(1), ranks=1) == 1, "with one rank nothing is gathered"


def test_a_budget_below_one_head_a_round_is_refused_with_the_arithmetic() -> None:
    needed = 2 * 100 * 2 * 24 * 2
    with pytest.raises(SequenceParallelConfigError) as failure:
        chosen(RoundBudget(needed - 1))
    said = str(failure.value)
    assert f"{needed - 1} bytes" in said
    assert f"400 * 48 = {needed} bytes" in said
    assert f'"{needed}B" or more' in said
    assert chosen(RoundBudget(needed)) == 16
    assert chosen(RoundBudget(1, binding=False)) == 16, "auto does what can be done"
    assert SequenceParallelConfig(
        method="ulysses", size=2, memory={"attention_rounds": f"{needed}B"}
    ).attention_rounds == RoundBudget(needed)
    assert not SequenceParallelConfig(method="ulysses", size=2, memory="auto").attention_rounds.binding
    assert SequenceParallelConfig(method="ulysses", size=2, memory={"attention_rounds": 3}).attention_rounds == 3
