"""Ulysses: scatter heads, gather the sequence, attend to all of it locally, and back (arXiv 2309.14509).

    q_BnHD, k_BnKD, v_BnKD  --one all-to-all-->  q_BLhD, k_BLkD, v_BLkD
    out_BLhD = attention(q, k, v)
    out_BLhD                --one all-to-all-->  out_BnHD

Any token order works: tokens are put into global order as they are unpacked, which costs nothing extra. Any head counts
work down to one query head per rank; see `HeadPartition`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.collectives import Route, all_to_all
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.kernels.softmax import attend
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import shard_ranges
from dsp_plugin.methods.inputs import SEQUENCE_DIM, check_shards, checked, illegal_heads
from dsp_plugin.methods.method import Method, Where, WireBytes, Workload

HEAD_DIM = 2


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


def attention(q: Tensor, k: Tensor, v: Tensor, *, what: AttentionSpec, where: Where) -> Tensor:
    """Exact attention over a sequence sharded along dim 1.

    Args:
        q: ``[B, n, H, D]``, this rank's tokens under the layout.
        k: ``[B, n, K, D]``, K a divisor of H.
        v: ``[B, n, K, Dv]``.
        what: to compute, over the whole sequence.
        where: the tokens are; of the groups the Ulysses axis is used, whose size must be the layout's.

    Returns:
        ``[B, n, H, Dv]``.

    Raises:
        SequenceParallelConfigError: shapes, head counts or document borders do not fit.
        UnsupportedError: the kernel cannot serve such tensors.
    """
    axis, layout = where.groups.ulysses, where.layout
    heads, kv_heads = q.shape[HEAD_DIM], k.shape[HEAD_DIM]
    check_shards(q, k, v, layout, axis)
    reasons = illegal(Workload(axis.size, heads, kv_heads, layout.length, layout=layout.kind, mask=what.mask))
    if reasons:
        raise SequenceParallelConfigError("ulysses cannot serve this attention: " + " ".join(reasons))
    call = checked(q, k, v, what, layout)

    tokens = tuple(layout.spans(rank) for rank in range(axis.size))
    heads_to_ranks = HeadExchange(axis, "ulysses", head_partition(heads, kv_heads, axis.size), tokens)
    q, k, v = heads_to_ranks.scatter(q, k, v)
    out, _ = attend(q, k, v, call.narrow(heads_to_ranks.heads, heads_to_ranks.q_per_kv))
    return heads_to_ranks.gather(out)


@dataclass(frozen=True)
class HeadExchange:
    """The two all-to-alls around an attention whose ranks hold all tokens of some heads.

    Attributes:
        axis: the ranks that exchange.
        method: for the ledger.
        part: which heads each rank gets.
        tokens: for every rank, where its local tokens stand among the gathered ones.
    """

    axis: Axis
    method: str
    part: HeadPartition
    tokens: tuple[tuple[range, ...], ...]

    def scatter(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, n, all heads, D]`` to ``[B, gathered tokens, own heads, D]``, in one collective."""
        by_key = self._route(self.part.keys)
        routes = (self._route(self.part.queries), by_key, by_key)
        q, k, v = all_to_all((q, k, v), routes, axis=self.axis, method=self.method)
        return q, k, v

    def gather(self, out: Tensor) -> Tensor:
        """``[B, gathered tokens, own heads, Dv]`` back to ``[B, n, all heads, Dv]``."""
        route = self._route(self.part.queries).inverse()
        return all_to_all((out,), (route,), axis=self.axis, method=self.method)[0]

    @property
    def heads(self) -> range:
        """The query heads of this rank."""
        return self.part.queries[self.axis.rank]

    @property
    def q_per_kv(self) -> tuple[int, ...]:
        """How many of this rank's query heads each of its key/value heads serves."""
        return self.part.queries_per_key(self.axis.rank)

    def _route(self, heads: tuple[range, ...]) -> Route:
        return Route(HEAD_DIM, SEQUENCE_DIM, tuple((run,) for run in heads), self.tokens)


def illegal(workload: Workload) -> list[str]:
    """Why Ulysses cannot serve the workload."""
    heads, size = workload.heads, workload.size
    reasons = illegal_heads(workload)
    if not reasons and heads < size:
        return [
            f"heads={heads} < ulysses_size={size}: each rank needs at least one of the query heads left on a "
            f"tensor-parallel rank; set a size of {heads} or less, or lower the tensor-parallel size."
        ]
    return reasons


def wire_bytes(workload: Workload, rank: int) -> WireBytes:
    """Bytes leaving ``rank``: 2(1+K/H)(U-1)/U * B*n*H*D*e each way where everything divides."""
    return wire_bytes_of_shard(workload, rank, workload.tokens().sizes)


def wire_bytes_of_shard(workload: Workload, rank: int, tokens: Sequence[int]) -> WireBytes:
    """As `wire_bytes`, with the tokens that each rank holds given."""
    part = head_partition(workload.heads, workload.kv_heads, workload.size)
    d, dv = workload.head_dim, workload.v_dim
    widths_in = [len(part.queries[peer]) * d + len(part.keys[peer]) * (d + dv) for peer in range(workload.size)]
    widths_out = [len(part.queries[peer]) * dv for peer in range(workload.size)]
    unit = workload.batch * workload.element_size
    mine, theirs = tokens[rank], sum(tokens) - tokens[rank]
    return WireBytes(
        forward=unit * (mine * (sum(widths_in) - widths_in[rank]) + theirs * widths_out[rank]),
        backward=unit * (mine * (sum(widths_out) - widths_out[rank]) + theirs * widths_in[rank]),
    )


METHOD = Method(
    name="ulysses",
    kind="softmax",
    paper="arXiv 2309.14509",
    axes=("ulysses",),
    layouts=("contiguous", "zigzag", "striped"),
    illegal=illegal,
    wire_bytes=wire_bytes,
    attention=attention,
)
