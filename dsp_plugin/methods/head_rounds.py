"""Which heads are exchanged and attended to in which round, and how many rounds a budget needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.layout import shard_ranges
from dsp_plugin.methods.head_partition import HeadPartition

SETTING = "memory.attention_rounds"


@dataclass(frozen=True)
class RoundBudget:
    """As many rounds as keep what one of them gathers within an amount of memory.

    Attributes:
        nbytes: that q, k, v and out of a round may take on a device, as gathered.
        binding: refuse what cannot be kept within it; otherwise as many rounds are made as there can be.
    """

    nbytes: int
    binding: bool = True


@dataclass(frozen=True)
class HeadRounds:
    """The heads of a partition, dealt out to rounds; each rank has some in every round.

    Whole key/value groups to a round while there are enough of them, as evenly as that goes. Where there are more
    rounds than groups on a rank, rounds share groups, none has parts of two, and the key/value head that several rounds
    need travels with the first. So all rounds together send what one would.

    Attributes:
        part: which heads each rank gets.
        count: C, of rounds.
    """

    part: HeadPartition
    count: int

    @cached_property
    def queries(self) -> tuple[tuple[range, ...], ...]:
        """Query heads by round and rank."""
        by_rank = [
            [range(mine.start + start, mine.start + stop) for start, stop in pairwise((0, *accumulate(sizes)))]
            for mine, sizes in zip(self.part.queries, self._sizes, strict=True)
        ]
        return tuple(zip(*by_rank, strict=True))

    @cached_property
    def keys(self) -> tuple[tuple[range, ...], ...]:
        """Key/value heads that they need, by round and rank."""
        group = self.part.heads // self.part.kv_heads
        return tuple(
            tuple(range(heads.start // group, (heads.stop - 1) // group + 1) for heads in by_rank)
            for by_rank in self.queries
        )

    @cached_property
    def arriving(self) -> tuple[tuple[range, ...], ...]:
        """Of `keys`, those that the round before did not have."""
        before = (None,) * self.part.ranks
        return tuple(
            tuple(now if now != then else range(0) for then, now in zip(earlier, by_rank, strict=True))
            for earlier, by_rank in zip((before, *self.keys), self.keys, strict=False)
        )

    def queries_per_key(self, index: int, rank: int) -> tuple[int, ...]:
        """How many of the rank's query heads of a round each of its key/value heads there serves."""
        group, mine = self.part.heads // self.part.kv_heads, self.queries[index][rank]
        return tuple(min(mine.stop, (kv + 1) * group) - max(mine.start, kv * group) for kv in self.keys[index][rank])

    def widest(self, head_dim: int, value_dim: int) -> int:
        """Elements a token of q, k, v and out together, of the round and rank that have most."""
        width = head_dim + value_dim
        return max(
            (len(heads) + len(kv)) * width
            for by_rank, kv_by_rank in zip(self.queries, self.keys, strict=True)
            for heads, kv in zip(by_rank, kv_by_rank, strict=True)
        )

    @cached_property
    def _sizes(self) -> list[list[int]]:
        """Query heads by rank and round."""
        return [_dealt(self.part.queries_per_key(rank), self.count) for rank in range(self.part.ranks)]


@lru_cache(maxsize=256)
def head_rounds(part: HeadPartition, count: int) -> HeadRounds:
    """The rounds, computed once per shape."""
    return HeadRounds(part, count)


def _dealt(groups: Sequence[int], count: int) -> list[int]:
    """Query heads of every round of a rank whose key/value heads serve as many each as ``groups`` says."""
    if count > len(groups):
        return _cut(groups, count)
    most = -(-sum(groups) // count)
    while (sizes := _filled(groups, count, most)) is None:
        most += 1
    return sizes


def _cut(groups: Sequence[int], count: int) -> list[int]:
    """Every group in at least one round, those whose rounds would be largest in more."""
    parts = [1] * len(groups)
    for _ in range(count - len(groups)):
        largest = max(range(len(groups)), key=lambda index: (-(-groups[index] // parts[index]), -index))
        parts[largest] += 1
    return [len(part) for size, ways in zip(groups, parts, strict=True) for part in shard_ranges(size, ways)]


def _filled(groups: Sequence[int], count: int, most: int) -> list[int] | None:
    """Whole groups in ``count`` rounds of at most ``most`` query heads, or None where that is too few."""
    sizes = [0]
    for index, size in enumerate(groups):
        if sizes[-1] and (sizes[-1] + size > most or len(groups) - index == count - len(sizes)):
            sizes.append(0)
        sizes[-1] += size
    return sizes if len(sizes) == count and max(sizes) <= most else None


def check(count: int, part: HeadPartition, *, whole_groups: bool) -> None:
    """Refuse more rounds than some rank has heads for.

    Args:
        whole_groups: a key/value head may not be needed in two rounds, for it would travel twice.

    Raises:
        SequenceParallelConfigError: there are more.
    """
    most = most_rounds(part, whole_groups=whole_groups)
    if count <= most:
        return
    held, heads = ("key/value", part.kv_heads) if whole_groups else ("query", part.heads)
    twice = "; keys of heads in two rounds would go round the ring in both" if whole_groups else ""
    raise SequenceParallelConfigError(
        setting=SETTING,
        value=count,
        why=f"{heads} {held} heads over ulysses_size={part.ranks} leave a rank {most}, and a round has at least one"
        f"{twice}",
        remedy=f"set it to {most} or less",
    )


def most_rounds(part: HeadPartition, *, whole_groups: bool) -> int:
    """As many as the rank with fewest heads, or key/value heads, has of them."""
    return min(map(len, part.keys if whole_groups else part.queries))


def choose(
    setting: int | RoundBudget, q: Tensor, v: Tensor, part: HeadPartition, tokens: int, *, whole_groups: bool
) -> HeadRounds:
    """The rounds that a setting means for these tensors, alike on all ranks.

    Args:
        q: ``[B, n, H, D]``; v: ``[B, n, K, Dv]``.
        part: of the heads among the ranks; with one rank nothing is gathered, and there is one round.
        tokens: that the heads of a round are gathered over, on the rank that gathers most.
        whole_groups: as for `check`.

    Raises:
        SequenceParallelConfigError: more rounds than some rank has heads for, or a budget that those do not suffice
            for.
    """
    if isinstance(setting, RoundBudget):
        most = most_rounds(part, whole_groups=whole_groups)
        setting = _within(setting, q, v, part, tokens, most) if part.ranks > 1 else 1
    check(setting, part, whole_groups=whole_groups)
    return head_rounds(part, setting if part.ranks > 1 else 1)


def _within(budget: RoundBudget, q: Tensor, v: Tensor, part: HeadPartition, tokens: int, most: int) -> int:
    unit, dims = q.shape[0] * tokens * q.element_size(), (q.shape[-1], v.shape[-1])
    for count in range(1, most + 1):
        needed = unit * head_rounds(part, count).widest(*dims)
        if needed <= budget.nbytes:
            return count
    if budget.binding:
        raise SequenceParallelConfigError(
            setting=SETTING,
            value=f"{budget.nbytes} bytes",
            why=f"in {most} rounds, of which each has at least one head on every rank, q, k, v and out of a round take "
            f"{unit} * {needed // unit} = {needed} bytes on the busiest rank: {q.shape[0]} x {tokens} tokens of "
            f"{q.element_size()} bytes, times {needed // unit} elements of its heads",
            remedy=f'set it to "{needed}B" or more, or use more ranks',
        )
    return most
