"""Ring attention: keys and values go round, partial results are merged by their log-sum-exp (arXiv 2310.01889).

    for every hop:  post the transfer of what is held to the next rank
                    attend from the local queries to the keys held, in a call or two, merge (out, lse) in fp32
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
from dsp_plugin.kernels.merge import accumulation_dtype
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods.block_sums import Gradients, Outputs, Picked
from dsp_plugin.methods.inputs import GradientDtype, check_shards, checked, gradient_dtype, illegal_heads
from dsp_plugin.methods.method import Method, Where, WireBytes, Workload
from dsp_plugin.methods.places import Places
from dsp_plugin.methods.ring_calls import Call
from dsp_plugin.methods.ring_schedule import Hop, RingSchedule
from dsp_plugin.methods.token_buffer import Tokens, add_, empty, joined, numel, packed, views

Share = tuple[Places, Tokens]


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
    return RingSchedule(tuple(layout.runs(rank) for rank in range(layout.size)), mask)


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
        return dq, dk, dv, None, None, None, None


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, schedule: RingSchedule, sender: Sender
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` without autograd, of a call whose blocks are cut at document borders already."""
    outputs, queries = Outputs(q, v), Picked(q)
    for hop, held in _rotation(Tokens(k, v), schedule, sender):
        for part in _calls(hop, call):
            (of_q,) = queries.of(part.q, again=part.again)
            found = part.forward(call, of_q, part.k.pick(held.k), part.k.pick(held.v))
            outputs.add(part.q, *found, again=part.again, may_be_empty=not part.every_query_sees)
    return outputs.total()


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
    """``(dq, dk, dv)`` of what `ring_forward` returned, in the dtype of q."""
    dq, queries = Gradients(q), Picked(dout, q, out, lse=lse)
    collection = _Collection(Tokens(k, v), schedule, sender, gradient_dtype)
    for hop, held in _rotation(Tokens(k, v), schedule, sender):
        shares = []
        parts = _calls(hop, call)
        for part in parts:
            of_dout, of_q, of_out, of_lse = queries.of(part.q, again=part.again)
            saved = of_q, part.k.pick(held.k), part.k.pick(held.v), of_out, of_lse
            of_queries, *of_keys = part.backward(call, of_dout, *saved)
            last = part is parts[-1] and hop.distance + 1 == schedule.size
            dq.add(part.q, of_queries, again=part.again, last=last)
            shares.append((part.k, Tokens(*of_keys)))
        collection.pass_on(hop, shares)
    return dq.total(), *collection.finish()


def _calls(hop: Hop, call: AttentionCall) -> tuple[Call, ...]:
    return hop.calls_by_run if call.spec.dropout_p else hop.calls


def _rotation(own: Tokens, schedule: RingSchedule, sender: Sender) -> Iterator[tuple[Hop, Tokens]]:
    """The keys and values that this rank reads, rank by rank; the next are on their way while the caller works."""
    rank, held, dtype = sender.axis.rank, own, own.k.dtype
    hops = schedule.hops(rank)
    for hop, upcoming in pairwise(hops):
        leaving = ((schedule.next(rank), held, hop.on), (hop.reader, own, hop.jumps))
        sends = {peer: packed(tokens, places, dtype) for peer, tokens, places in leaving if places}
        arriving = {
            peer: places
            for peer, places in ((schedule.before(rank), hop.passed), (upcoming.source, hop.jumped))
            if places
        }
        receives = {peer: numel(own, places) for peer, places in arriving.items()}
        transfer = Transfers(sends, receives, own.k, "ring_hop", sender)
        yield hop, held
        arrived = transfer.wait()
        held = joined(own, upcoming.tokens, [(arrived[peer], places) for peer, places in arriving.items()])
    yield hops[-1], held


class _Collection:
    """Gradients of keys and values on their way: added up from reader to reader, then home to their owner.

    Args:
        own: this rank's keys and values, whose gradients are collected: its own share, and what others send home.
        dtype: in which they travel. They are added up in fp32 or wider.
    """

    def __init__(self, own: Tokens, schedule: RingSchedule, sender: Sender, dtype: torch.dtype) -> None:
        self._own, self._schedule, self._sender, self._dtype = own, schedule, sender, dtype
        self._wide = accumulation_dtype(own.k.dtype)
        self._home = Gradients(own.k), Gradients(own.v)
        self._under_way: tuple[Hop, Transfers] | None = None

    def pass_on(self, hop: Hop, shares: list[Share]) -> None:
        """Add this rank's shares to what the rank before has gathered, and send everything on its way."""
        if hop.distance == 0:
            for places, share in shares:
                self._bring_home(places, share)
            return
        gathered = self._gathered(hop, shares)
        rank, schedule = self._sender.axis.rank, self._schedule
        leaving = ((schedule.next(rank), hop.on), (hop.source, hop.done))
        arriving = ((schedule.before(rank), hop.passed), (hop.visitor, hop.returned))
        sends = {peer: packed(gathered, places, self._dtype) for peer, places in leaving if places}
        receives = {peer: numel(self._own, places) for peer, places in arriving if places}
        like = self._own.k.new_empty(0, dtype=self._dtype)
        self._under_way = hop, Transfers(sends, receives, like, "ring_gradient", self._sender)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The gradients of this rank's keys and values, once the last of them have come home."""
        self._receive(last=True)
        of_k, of_v = self._home
        return of_k.total(), of_v.total()

    def _gathered(self, hop: Hop, shares: list[Share]) -> Tokens:
        """The gradients of what is held, of this rank and those before it."""
        arrived, places = self._receive(), self._passed
        if places.covers(hop.tokens) and arrived is not None:
            # What has arrived has served its purpose as a buffer.
            total = views(arrived.to(self._wide), self._own, hop.tokens)
        else:
            total = self._of_shares(hop.tokens, shares)
            shares = []
            if arrived is not None:
                add_(total, places, views(arrived, self._own, places.count))
        for places, share in shares:
            add_(total, places, share)
        return total

    def _of_shares(self, tokens: int, shares: list[Share]) -> Tokens:
        total = empty(self._own, tokens, self._wide)
        assert total.flat is not None
        if len(shares) == 1 and shares[0][0].covers(tokens):
            total.k.copy_(shares[0][1].k)
            total.v.copy_(shares[0][1].v)
            return total
        total.flat.zero_()
        for places, share in shares:
            add_(total, places, share)
        return total

    def _receive(self, last: bool = False) -> Tensor | None:
        """What the rank before has gathered of what is held now; what has come home is put there."""
        if self._under_way is None:
            self._passed = Places.whole(0)
            return None
        hop, transfers = self._under_way
        arrived = transfers.wait()
        self._passed = hop.passed
        if hop.returned:
            self._bring_home(hop.returned, views(arrived[hop.visitor], self._own, hop.returned.count), last)
        return arrived[self._schedule.before(self._sender.axis.rank)] if hop.passed else None

    def _bring_home(self, places: Places, share: Tokens, last: bool = False) -> None:
        for total, gradient in zip(self._home, (share.k, share.v), strict=True):
            total.add(places, gradient, last=last)


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
