"""What one attention may cost on a GPU besides attention, and what it costs today: bf16, 64 entries a head.

Of the second pass; a rank in the middle of 8, unless said otherwise; 4,096 tokens, 32 query and 8 key/value heads.
Launches are operators that move something, attention's own apart. Traffic is what they read and write, in times of a
rank's queries. A budget that is not held yet is marked by what is measured: who holds it changes the figure here.
"""

from __future__ import annotations

from typing import NamedTuple

from attention_cases import Case, Pass


class Cost(NamedTuple):
    """Forward and backward.

    Attributes:
        launches: without attention.
        attention: calls of attention kernels.
        traffic: in shards of queries.
        collectives: and sends and receives, each by itself.
    """

    launches: tuple[int, int]
    attention: tuple[int, int]
    traffic: tuple[float, float]
    collectives: tuple[int, int]

    @classmethod
    def of(cls, done: Pass, shard: int) -> Cost:
        """That of a pass."""
        both = (done.forward, done.backward)
        return cls(
            *(tuple(getattr(counts, name) for counts in both) for name in ("launches", "attention")),
            tuple(round(counts.traffic / shard, 1) for counts in both),
            tuple(counts.collectives for counts in both),
        )

    def within(self, other: Cost, column: str) -> bool:
        """Whether a column is no more than that of another."""
        return all(mine <= theirs for mine, theirs in zip(getattr(self, column), getattr(other, column), strict=True))


COLUMNS = Cost._fields
_ANY = (10**9, 10**9)


class Row(NamedTuple):
    """A case, what it costs today, and what it may cost; None where there is no budget."""

    name: str
    case: Case
    today: Cost
    budget: Cost | None = None


# One collective each way takes one buffer: q, k and v are packed by one launch, which reads and writes 1.5 X, and so
# are their gradients, unless the kernel has put them there; these are unpacked by another one, and a tensor of 1 X is
# packed or unpacked by one that reads and writes it. Another order of tokens is one launch more on each of these ways.
# The gradients of three leaves are not added up here.
_EVEN = Cost((2, 3), (1, 1), (5.0, 8.0), (2, 2))
_REORDERED = Cost((4, 5), (1, 1), (10.0, 13.0), (2, 2))
_UNEVEN = Cost((8, 9), (1, 1), (10.0, 13.0), (2, 2))


def _hops(
    count: int, calls: int, around: tuple[int, int] = (0, 0), traffic: tuple[float, float] = (10**9, 10**9)
) -> Cost:
    """Five launches a hop forward and four backward, and six at the ends."""
    return Cost((5 * count + 6 + around[0], 4 * count + 6 + around[1]), (calls, calls), traffic, _ANY)


def _packed_hops(count: int) -> Cost:
    """Ten launches and two calls a hop, whatever the documents."""
    return Cost((10 * count, 10 * count), (2 * count, 2 * count), _ANY, _ANY)


# What yunchang 0.6 reads and writes of the same, flash-attn replaced by an operator that is not counted.
_YUNCHANG_RING, _YUNCHANG_ZIGZAG = (142.1, 61.5), (111.3, 58.8)


ROWS = (
    Row("ulysses", Case("ulysses", 8, 3), Cost((2, 3), (1, 1), (5.0, 8.0), (2, 2)), _EVEN),
    Row(
        "ulysses, zigzag",
        Case("ulysses", 8, 3, order="zigzag"),
        Cost((4, 5), (1, 1), (10.0, 13.0), (2, 2)),
        _REORDERED,
    ),
    Row(
        "ulysses, striped",
        Case("ulysses", 8, 3, order="striped"),
        Cost((4, 5), (1, 1), (10.0, 13.0), (2, 2)),
        _REORDERED,
    ),
    Row("ulysses, batch of 4", Case("ulysses", 8, 3, batch=4), Cost((2, 3), (1, 1), (5.0, 8.0), (2, 2)), _EVEN),
    Row(
        "ulysses, 28 heads and a length that does not divide",
        Case("ulysses", 8, 3, tokens=4099, heads=28, kv_heads=4),
        Cost((3, 5), (1, 1), (7.8, 10.1), (2, 2)),
        _UNEVEN,
    ),
    Row(
        "ulysses, 8 packed documents, P = 4",
        Case("ulysses", 4, 1, "packed", documents=8),
        _EVEN,
        _EVEN,
    ),
    Row(
        "ulysses, 28 heads, zigzag, batch of 2",
        Case("ulysses", 8, 3, order="zigzag", tokens=4099, batch=2, heads=28, kv_heads=4),
        Cost((5, 7), (1, 1), (12.4, 14.7), (2, 2)),
        _UNEVEN._replace(traffic=_ANY),
    ),
    Row(
        "ulysses, a key/value head for two ranks",
        Case("ulysses", 8, 3, kv_heads=4),
        Cost((2, 5), (1, 1), (4.8, 9.8), (2, 2)),
        _UNEVEN,
    ),
    Row(
        # The kernel pads values, and what it returns is as wide.
        "ulysses, values of another head dim",
        Case("ulysses", 8, 3, head_dim=96, value_dim=64),
        Cost((4, 6), (1, 1), (5.9, 10.8), (2, 2)),
        _UNEVEN,
    ),
    Row(
        "ulysses, zigzag by document",
        Case("ulysses", 8, 3, order="documents", documents=8),
        Cost((4, 5), (1, 1), (10.0, 13.0), (2, 2)),
        _REORDERED,
    ),
    Row(
        "ulysses, 2 rounds of heads, P = 4",
        Case("ulysses", 4, 1, rounds=2),
        Cost((4, 10), (2, 2), (5.0, 8.0), (4, 4)),
        Cost((4, 10), (2, 2), (5.0, 8.0), (4, 4)),
    ),
    Row(
        "ulysses, 3 rounds of heads that share keys, P = 4",
        Case("ulysses", 4, 1, heads=28, kv_heads=4, rounds=3),
        Cost((6, 17), (3, 3), (4.6, 10.6), (6, 6)),
    ),
    Row(
        "ulysses, dropout, 1,024 tokens, P = 4",
        Case("ulysses", 4, 1, tokens=1024, dropout=0.1),
        _EVEN,
        _EVEN,
    ),
    Row(
        "ring, no mask",
        Case("ring", 8, 3, "full"),
        Cost((10, 25), (8, 8), (43.2, 58.5), (14, 28)),
        _hops(8, 8, traffic=_YUNCHANG_RING),
    ),
    Row("ring, the last rank", Case("ring", 8, 7), Cost((9, 22), (8, 8), (41.7, 54.5), (7, 20)), _hops(8, 8)),
    Row(
        "ring, zigzag",
        Case("ring", 8, 3, order="zigzag"),
        Cost((10, 32), (8, 8), (33.0, 48.3), (14, 29)),
        _hops(8, 8, traffic=_YUNCHANG_ZIGZAG),
    ),
    Row(
        "ring, striped",
        Case("ring", 8, 3, order="striped"),
        Cost((10, 27), (8, 8), (43.1, 60.5), (14, 28)),
        _hops(8, 8),
    ),
    Row(
        "ring, zigzag, window of a third",
        Case("ring", 8, 3, "window", "zigzag"),
        Cost((13, 42), (9, 9), (26.9, 45.6), (15, 31)),
    ),
    Row(
        "ring, 128 packed documents, zigzag by document, 32,768 tokens",
        Case("ring", 8, 3, "packed", "documents", tokens=32768, documents=128),
        Cost((16, 36), (8, 8), (43.1, 57.3), (14, 29)),
        _packed_hops(8),
    ),
    Row(
        "ring, 8 packed documents, striped",
        Case("ring", 8, 3, "packed", "striped", documents=8),
        Cost((40, 65), (8, 8), (96.8, 107.9), (14, 28)),
        _packed_hops(8),
    ),
    Row(
        "ring, 8 packed documents, zigzag by document, P = 4",
        Case("ring", 4, 1, "packed", "documents", documents=8),
        Cost((12, 24), (4, 4), (27.8, 34.8), (6, 13)),
        _packed_hops(4),
    ),
    Row(
        "usp 2 x 4, zigzag",
        Case("usp", 8, 3, order="zigzag"),
        Cost((10, 25), (4, 4), (27.7, 38.8), (8, 15)),
        _hops(4, 4, around=(5, 5)),
    ),
    Row(
        "usp 2 x 4, 8 packed documents, zigzag by document",
        Case("usp", 8, 3, "packed", "documents", documents=8),
        Cost((16, 29), (4, 4), (37.8, 47.8), (8, 15)),
        _packed_hops(4),
    ),
    Row(
        "lightseq, window of a third",
        Case("lightseq", 8, 3, "window"),
        Cost((8, 29), (4, 4), (22.6, 40.4), (6, 12)),
        Cost((31, 30), (5, 5), _ANY, _ANY),
    ),
    Row("lightseq", Case("lightseq", 8, 3), Cost((9, 26), (4, 4), (25.3, 41.5), (7, 14)), _hops(5, 5)),
    Row(
        "dsp switch",
        Case("dsp", 8, 3),
        Cost((1, 1), (0, 0), (2.0, 2.0), (1, 1)),
        Cost((1, 1), (0, 0), (2.0, 2.0), (1, 1)),
    ),
    Row(
        "dsp switch, batch of 4",
        Case("dsp", 8, 3, batch=4),
        Cost((1, 1), (0, 0), (2.0, 2.0), (1, 1)),
        Cost((1, 1), (0, 0), (2.0, 2.0), (1, 1)),
    ),
    Row(
        "dsp switch, batch of 16",
        Case("dsp", 8, 3, batch=16),
        Cost((1, 1), (0, 0), (2.0, 2.0), (1, 1)),
        Cost((1, 1), (0, 0), (2.0, 2.0), (1, 1)),
    ),
    Row(
        # Of two sizes, larger ones first.
        "dsp switch of sizes that do not divide, P = 3",
        Case("dsp", 3, 1, batch=4),
        Cost((2, 2), (0, 0), (2.0, 2.0), (1, 1)),
        Cost((2, 2), (0, 0), (2.0, 2.0), (1, 1)),
    ),
    Row("lasp, decay per token", Case("lasp", 8, 3), Cost((78, 164), (0, 0), (130.9, 327.3), (1, 1))),
    Row(
        "lasp, decay per token, ring",
        Case("lasp", 8, 3, exchange="ring"),
        Cost((74, 159), (0, 0), (129.2, 324.3), (2, 2)),
    ),
    Row(
        "lasp, decay per token, zigzag, which is put in order",
        Case("lasp", 8, 3, order="zigzag"),
        Cost((87, 175), (0, 0), (144.1, 340.5), (4, 4)),
    ),
)
