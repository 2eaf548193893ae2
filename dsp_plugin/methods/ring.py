"""Ring attention: keys and values go round, partial results are merged by their log-sum-exp (arXiv 2310.01889).

    for every hop:  post the transfer of what is held to the next rank
                    attend from the local queries to the keys held, merge (out, lse) in fp32
                    wait for the keys of the rank before

The backward pass sends keys and values round again, and gathers their gradients along the way. A rank's own share of
its gradients never leaves it. Who needs what is the schedule's business, see `dsp_plugin.methods.ring_schedule`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm.wire import Sender, Transfers
from dsp_plugin.derivatives import once_differentiable
from dsp_plugin.kernels.call import AttentionCall
from dsp_plugin.kernels.merge import accumulation_dtype, empty_state, merge_
from dsp_plugin.kernels.softmax import block_backward, block_forward
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods.inputs import GradientDtype, check_shards, checked, gradient_dtype, illegal_heads
from dsp_plugin.methods.method import Method, Where, WireBytes, Workload
from dsp_plugin.methods.ring_schedule import Hop, RingSchedule
from dsp_plugin.methods.token_buffer import Tokens, add_, joined, numel, packed, zeros


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    what: AttentionSpec,
    where: Where,
    ring_gradient_dtype: GradientDtype = "fp32",
) -> Tensor:
    """Exact attention over a sequence sharded along dim 1; arguments and result as for `ulysses.attention`.

    Any head counts. Keys go to the ranks that see them and no other, and blocks whose mask is empty are not computed.

    Args:
        ring_gradient_dtype: in which gradients of keys and values travel; they are added up in fp32.

    Raises:
        SequenceParallelConfigError: shapes do not fit.
    """
    axis, layout = where.groups.ring, where.layout
    check_shards(q, k, v, layout, axis)
    call = checked(q, k, v, what, layout)
    travel = gradient_dtype(ring_gradient_dtype, q.dtype)
    return ring_attention(q, k, v, call, schedule_of(layout, what.mask), Sender(axis, "ring", "forward"), travel)


@lru_cache(maxsize=64)
def schedule_of(layout: Layout, mask: MaskSpec) -> RingSchedule:
    """The schedule of a ring over all ranks of the layout, computed once per layout and mask."""
    return RingSchedule(tuple(layout.spans(rank) for rank in range(layout.size)), mask)


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    schedule: RingSchedule,
    sender: Sender,
    gradient_dtype: torch.dtype,
) -> Tensor:
    """The ring over ``sender.axis``, whose ranks hold the tokens that the schedule says."""
    return _Ring.apply(q, k, v, call.within_documents(), schedule, sender, gradient_dtype)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: AttentionCall,
        schedule: RingSchedule,
        sender: Sender,
        gradient_dtype: torch.dtype,
    ) -> Tensor:
        out, lse = ring_forward(q, k, v, call, schedule, sender)
        ctx.call, ctx.schedule, ctx.sender, ctx.gradient_dtype = call, schedule, sender.backward(), gradient_dtype
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        saved = q, k, v, out, lse
        dq, dk, dv = ring_backward(dout, *saved, ctx.call, ctx.schedule, ctx.sender, ctx.gradient_dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, schedule: RingSchedule, sender: Sender
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` without autograd, of a call whose blocks are cut at document borders already."""
    out, lse = empty_state(q, v)
    for hop, held in _rotation(Tokens(k, v), schedule, sender):
        for work in hop.work:
            keys, values = held.k[:, work.k], held.v[:, work.k]
            partial = block_forward(call, q[:, work.q], keys, values, work.q_positions, work.k_positions)
            merge_(out[:, work.q], lse[:, :, work.q], *partial)
    return out.to(q.dtype), lse


def ring_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    call: AttentionCall,
    schedule: RingSchedule,
    sender: Sender,
    gradient_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` of what `ring_forward` returned, in fp32 or wider."""
    wide = accumulation_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    collection = _Collection(Tokens(dk, dv), schedule, sender, gradient_dtype)
    for hop, held in _rotation(Tokens(k, v), schedule, sender):
        shares = collection.shares(hop)
        for work in hop.work:
            gradients = block_backward(
                call,
                dout[:, work.q],
                q[:, work.q],
                held.k[:, work.k],
                held.v[:, work.k],
                out[:, work.q],
                lse[:, :, work.q],
                work.q_positions,
                work.k_positions,
            )
            totals = dq[:, work.q], shares.k[:, work.k], shares.v[:, work.k]
            for total, gradient in zip(totals, gradients, strict=True):
                total.add_(gradient)
        collection.pass_on(hop, shares)
    collection.finish()
    return dq, dk, dv


def _rotation(own: Tokens, schedule: RingSchedule, sender: Sender) -> Iterator[tuple[Hop, Tokens]]:
    """The keys and values that this rank reads, rank by rank; the next are on their way while the caller works."""
    rank, held, dtype = sender.axis.rank, own, own.k.dtype
    hops = schedule.hops(rank)
    for hop, upcoming in pairwise(hops):
        leaving = ((schedule.next(rank), held, hop.on), (hop.reader, own, hop.jumps))
        sends = {peer: packed(tokens, slices, dtype) for peer, tokens, slices in leaving if slices}
        arriving = {
            peer: slices
            for peer, slices in ((schedule.before(rank), hop.passed), (upcoming.source, hop.jumped))
            if slices
        }
        receives = {peer: numel(own, slices) for peer, slices in arriving.items()}
        transfer = Transfers(sends, receives, own.k, "ring_hop", sender)
        yield hop, held
        arrived = transfer.wait()
        held = joined(own, upcoming.tokens, [(arrived[peer], slices) for peer, slices in arriving.items()])
    yield hops[-1], held


class _Collection:
    """Gradients of keys and values on their way: added up from reader to reader, then home to their owner.

    Args:
        own: this rank's own gradients, where its own share is added, and what others send home.
        dtype: in which they travel. They are added up in the dtype of ``own``.
    """

    def __init__(self, own: Tokens, schedule: RingSchedule, sender: Sender, dtype: torch.dtype) -> None:
        self._own, self._schedule, self._sender, self._dtype = own, schedule, sender, dtype
        self._under_way: tuple[Hop, Transfers] | None = None

    def shares(self, hop: Hop) -> Tokens:
        """Where to add this rank's share of the gradients of what it holds."""
        return zeros(self._own, hop.tokens) if hop.distance else self._own

    def pass_on(self, hop: Hop, shares: Tokens) -> None:
        """Add what the rank before has gathered, and send everything on its way."""
        if hop.distance == 0:
            return
        self._receive(shares)
        rank, schedule = self._sender.axis.rank, self._schedule
        leaving = ((schedule.next(rank), hop.on), (hop.source, hop.done))
        arriving = ((schedule.before(rank), hop.passed), (hop.visitor, hop.returned))
        sends = {peer: packed(shares, slices, self._dtype) for peer, slices in leaving if slices}
        receives = {peer: numel(self._own, slices) for peer, slices in arriving if slices}
        like = self._own.k.new_empty(0, dtype=self._dtype)
        self._under_way = hop, Transfers(sends, receives, like, "ring_gradient", self._sender)

    def finish(self) -> None:
        """Wait for the last gradients to come home."""
        self._receive(self._own)

    def _receive(self, shares: Tokens) -> None:
        if self._under_way is None:
            return
        hop, transfers = self._under_way
        arrived = transfers.wait()
        if hop.passed:
            add_(shares, hop.passed, arrived[self._schedule.before(self._sender.axis.rank)])
        if hop.returned:
            add_(self._own, hop.returned, arrived[hop.visitor])


def illegal(workload: Workload) -> list[str]:
    """Why the ring cannot serve the workload: only where no attention could."""
    return illegal_heads(workload)


def wire_bytes(workload: Workload, rank: int) -> WireBytes:
    """Bytes leaving ``rank``; 2(R-1)K/H * B*n*H*D*e forward where every rank sees every key.

    Every key goes to every rank that sees it, once; in zigzag order and causal, that is to three quarters of the others
    on average. Backward: the keys and values again, and their gradients, in fp32 (fp64 for fp64 inputs) by default.
    """
    return wire_bytes_of_schedule(workload, schedule_of(workload.tokens(), workload.mask), rank)


def wire_bytes_of_schedule(workload: Workload, schedule: RingSchedule, rank: int) -> WireBytes:
    """As `wire_bytes`, with the schedule given."""
    width = workload.batch * workload.kv_heads * (workload.head_dim + workload.v_dim)
    keys = schedule.key_tokens_sent(rank) * width * workload.element_size
    gradients = schedule.gradient_tokens_sent(rank) * width * workload.gradient_size
    return WireBytes(keys, keys + gradients)


METHOD = Method(
    name="ring",
    kind="softmax",
    paper="arXiv 2310.01889",
    axes=("ring",),
    layouts=("zigzag", "contiguous", "striped"),
    illegal=illegal,
    wire_bytes=wire_bytes,
    attention=attention,
    settings=("ring_gradient_dtype",),
)
