"""Ulysses: scatter heads, gather the sequence, attend to all of it locally, and back (arXiv 2309.14509).

    q_BnHD, k_BnKD, v_BnKD  --one all-to-all-->  q_BLhD, k_BLkD, v_BLkD
    out_BLhD = attention(q, k, v)
    out_BLhD                --one all-to-all-->  out_BnHD

Any token order works: tokens are put into global order as they are unpacked, which costs nothing extra. Any head counts
work down to one query head per rank; see `HeadPartition`. Heads may go in rounds, see `in_rounds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.kernels.call import AttentionCall
from dsp_plugin.kernels.softmax import attend, block_backward, block_forward
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout
from dsp_plugin.methods.head_exchange import HEAD_DIM, HeadExchange
from dsp_plugin.methods.head_partition import head_partition
from dsp_plugin.methods.head_rounds import RoundBudget, choose
from dsp_plugin.methods.in_rounds import attention_in_rounds
from dsp_plugin.methods.inputs import SEQUENCE_DIM, check_shards, checked, illegal_heads
from dsp_plugin.methods.method import Method, Where, WireBytes, Workload


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    what: AttentionSpec,
    where: Where,
    attention_rounds: int | RoundBudget = 1,
) -> Tensor:
    """Exact attention over a sequence sharded along dim 1.

    Args:
        q: ``[B, n, H, D]``, this rank's tokens under the layout.
        k: ``[B, n, K, D]``, K a divisor of H.
        v: ``[B, n, K, Dv]``.
        what: to compute, over the whole sequence.
        where: the tokens are; of the groups the Ulysses axis is used, whose size must be the layout's.
        attention_rounds: in how many rounds of heads to do so, or what one of them may gather, see `in_rounds`.

    Returns:
        ``[B, n, H, Dv]``.

    Raises:
        SequenceParallelConfigError: shapes, head counts, rounds or document borders do not fit.
        UnsupportedError: the kernel cannot serve such tensors.
    """
    axis, layout = where.groups.ulysses, where.layout
    heads, kv_heads = q.shape[HEAD_DIM], k.shape[HEAD_DIM]
    check_shards(q, k, v, layout, axis)
    reasons = illegal(Workload(axis.size, heads, kv_heads, layout.length, layout=layout.kind, mask=what.mask))
    if reasons:
        raise SequenceParallelConfigError("ulysses cannot serve this attention: " + " ".join(reasons))
    call = checked(q, k, v, what, layout)

    part = head_partition(heads, kv_heads, axis.size)
    rounds = choose(attention_rounds, q, v, part, layout.length, whole_groups=False)
    heads_to_ranks = HeadExchange(axis, "ulysses", part, _tokens(layout))
    if rounds.count > 1:
        return attention_in_rounds(q, k, v, call, rounds, heads_to_ranks, _Whole())
    q, k, v = heads_to_ranks.scatter(q, k, v)
    out, _ = attend(q, k, v, call.narrow(heads_to_ranks.heads, heads_to_ranks.q_per_kv))
    return heads_to_ranks.gather(out)


@lru_cache(maxsize=64)
def _tokens(layout: Layout) -> tuple[tuple[range, ...], ...]:
    """Of every rank; the same object every time."""
    return tuple(layout.spans(rank) for rank in range(layout.size))


class _Whole:
    """Attention of heads whose tokens are all here."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
        tokens = range(q.shape[SEQUENCE_DIM])
        out, lse = block_forward(call, q, k, v, tokens, tokens)
        return out.to(q.dtype), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = range(q.shape[SEQUENCE_DIM])
        return block_backward(call, dout, q, k, v, out, lse, tokens, tokens)


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
    settings=("attention_rounds",),
)
