"""Which heads each rank of a Ulysses group computes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from dsp_plugin.layout import shard_ranges


@dataclass(frozen=True)
class HeadPartition:
    """Which query heads each Ulysses rank computes, and which key/value heads they need.

    Whole key/value groups where that keeps the ranks as even as floor and ceiling can; otherwise a group is cut and its
    key/value head goes to both ranks. With fewer key/value heads than ranks every rank gets exactly one, so that no
    head is sent twice to a rank or repeated in memory before sending.
    """

    heads: int
    kv_heads: int
    ranks: int

    @cached_property
    def queries(self) -> tuple[range, ...]:
        """Query heads by rank."""
        even = shard_ranges(self.heads, self.ranks)
        whole_groups = self._along_groups()
        if self.kv_heads < self.ranks or max(map(len, whole_groups)) == len(even[0]):
            return whole_groups
        return even

    @cached_property
    def keys(self) -> tuple[range, ...]:
        """Key/value heads by rank."""
        group = self.heads // self.kv_heads
        return tuple(range(heads.start // group, (heads.stop - 1) // group + 1) for heads in self.queries)

    def queries_per_key(self, rank: int) -> tuple[int, ...]:
        """How many of the rank's query heads each of its key/value heads serves."""
        group, mine = self.heads // self.kv_heads, self.queries[rank]
        return tuple(min(mine.stop, (kv + 1) * group) - max(mine.start, kv * group) for kv in self.keys[rank])

    def _along_groups(self) -> tuple[range, ...]:
        group = self.heads // self.kv_heads
        if self.kv_heads >= self.ranks:
            return tuple(range(kv.start * group, kv.stop * group) for kv in shard_ranges(self.kv_heads, self.ranks))
        return tuple(
            range(kv * group + part.start, kv * group + part.stop)
            for kv, sharers in enumerate(shard_ranges(self.ranks, self.kv_heads))
            for part in shard_ranges(group, len(sharers))
        )


@lru_cache(maxsize=256)
def head_partition(heads: int, kv_heads: int, ranks: int) -> HeadPartition:
    """The partition, computed once per shape."""
    return HeadPartition(heads, kv_heads, ranks)
