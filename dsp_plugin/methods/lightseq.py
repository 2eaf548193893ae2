"""LightSeq, also DistFlashAttn: causal attention balanced without reordering tokens (arXiv 2310.03294).

Rank i owns queries and keys i, contiguous; block (i, j) is queries i against keys j, and causal needs j <= i. In step
t rank i computes its own block (i, i - t) with fetched keys, as long as it has one; a rank that has none helps: it
computes block (i + P - t, i) with fetched queries and its own keys, and returns the partial result.

    step      rank 0       rank 1       rank 2       rank 3       rank 4
      0       (0, 0)       (1, 1)       (2, 2)       (3, 3)       (4, 4)
      1     helps (4, 0)   (1, 0)       (2, 1)       (3, 2)       (4, 3)
      2     helps (3, 0) helps (4, 1)   (2, 0)       (3, 1)       (4, 2)

For odd P nobody ever idles. For even P the last step, t = P/2, has P/2 blocks for P ranks. What step t + 1 needs is in
flight while step t computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm.packing import Form, pack, unpack
from dsp_plugin.comm.wire import Sender, Transfers
from dsp_plugin.derivatives import once_differentiable
from dsp_plugin.kernels.blocks import blocks
from dsp_plugin.kernels.call import AttentionCall
from dsp_plugin.kernels.merge import accumulation_dtype, empty_state, merge_
from dsp_plugin.kernels.softmax import block_backward, block_forward
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import ring
from dsp_plugin.methods.inputs import GradientDtype, check_shards, checked, gradient_dtype
from dsp_plugin.methods.method import Method, Where, WireBytes, Workload


@dataclass(frozen=True)
class Schedule:
    """Who computes which block when.

    Attributes:
        runs: global positions of every rank's tokens; empty ranges for ranks without.
        mask: causal.
    """

    runs: tuple[range, ...]
    mask: MaskSpec

    @property
    def size(self) -> int:
        """P."""
        return len(self.runs)

    @property
    def steps(self) -> int:
        """Steps after step 0."""
        return self.size // 2

    def block(self, step: int, rank: int) -> tuple[int, int] | None:
        """Queries' and keys' owners of the block that ``rank`` computes in ``step``; None if it idles."""
        owners = (rank, rank - step) if rank >= step else (rank + self.size - step, rank)
        if rank < step and 2 * step == self.size:
            return None
        return owners if blocks(self.mask, self.runs[owners[0]], self.runs[owners[1]]) else None

    def key_user(self, step: int, rank: int) -> int | None:
        """The rank that fetches the keys of ``rank`` for ``step``."""
        user = rank + step
        return user if user < self.size and self.block(step, user) is not None else None

    def helper(self, step: int, rank: int) -> int | None:
        """The rank that computes a block with the queries of ``rank`` in ``step``."""
        helper = rank + step - self.size
        return helper if helper >= 0 and self.block(step, helper) is not None else None

    def idle_share(self) -> float:
        """Share of all ranks' steps in which a rank has no block: 0 for odd P, 1/(P+2) for even P without a window."""
        slots = [self.block(step, rank) is None for step in range(self.steps + 1) for rank in range(self.size)]
        return sum(slots) / len(slots)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    what: AttentionSpec,
    where: Where,
    ring_gradient_dtype: GradientDtype = "fp32",
) -> Tensor:
    """Exact attention over a sequence sharded along dim 1; arguments and result as for `ring.attention`.

    Contiguous layout, any head counts. A mask that is not causal has nothing to balance and goes round the ring.

    Raises:
        SequenceParallelConfigError: shapes do not fit.
    """
    axis, layout = where.groups.ring, where.layout
    check_shards(q, k, v, layout, axis)
    call = checked(q, k, v, what, layout)
    sender = Sender(axis, "lightseq", "forward")
    travel = gradient_dtype(ring_gradient_dtype, q.dtype)
    if not what.mask.causal:
        return ring.ring_attention(q, k, v, call, ring.schedule_of(layout, what.mask), sender, travel)
    return _LightSeq.apply(q, k, v, call, _schedule(layout, what.mask), sender, travel)


class _LightSeq(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        call: AttentionCall,
        schedule: Schedule,
        sender: Sender,
        gradient_dtype: torch.dtype,
    ) -> Tensor:
        out, lse = empty_state(q, v)

        def compute(queries: Bundle, keys: Bundle, q_run: range, k_run: range) -> tuple[Bundle, Bundle]:
            (their_q,), (their_k, their_v) = queries, keys
            partial, partial_lse = block_forward(call, their_q, their_k, their_v, q_run, k_run)
            # Tokens in dim 1, as in every bundle.
            return (partial, partial_lse.transpose(1, 2)), ()

        def add(results: Bundle) -> None:
            partial, partial_lse = results
            merge_(out, lse, partial, partial_lse.transpose(1, 2))

        results = (Form(out.shape, q.dtype), Form(lse.transpose(1, 2).shape, lse.dtype))
        _run(schedule, sender, _Side((q,), results, add), _Side((k, v), (), lambda _: None), compute)
        out = out.to(q.dtype)
        ctx.call, ctx.schedule, ctx.sender, ctx.gradient_dtype = call, schedule, sender.backward(), gradient_dtype
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        wide, travel = accumulation_dtype(q.dtype), ctx.gradient_dtype
        dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))

        def compute(queries: Bundle, keys: Bundle, q_run: range, k_run: range) -> tuple[Bundle, Bundle]:
            (their_q, their_dout, their_out, their_lse), (their_k, their_v) = queries, keys
            gradients = block_backward(
                ctx.call, their_dout, their_q, their_k, their_v, their_out, their_lse.transpose(1, 2), q_run, k_run
            )
            of_q, *of_keys = gradients
            return (of_q,), tuple(of_keys)

        queries = _Side((q, dout, out, lse.transpose(1, 2)), (Form(q.shape, travel),), lambda got: _add_to((dq,), got))
        keys = _Side((k, v), (Form(k.shape, travel), Form(v.shape, travel)), lambda got: _add_to((dk, dv), got))
        _run(ctx.schedule, ctx.sender, queries, keys, compute)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


Bundle = tuple[Tensor, ...]
Compute = Callable[[Bundle, Bundle, range, range], tuple[Bundle, Bundle]]


@dataclass(frozen=True)
class _Side:
    """The query side or the key side of a pass, on the rank that owns the tokens.

    Attributes:
        inputs: what a block needs of this side; every tensor has its tokens in dim 1.
        results: what a block returns to this side, as it travels.
        add: takes one block's results.
    """

    inputs: Bundle
    results: tuple[Form, ...]
    add: Callable[[Bundle], None]

    def forms(self, tokens: int) -> list[Form]:
        """The inputs as they come from a rank with that many tokens."""
        return [Form((x.shape[0], tokens, *x.shape[2:]), x.dtype) for x in self.inputs]


def _run(schedule: Schedule, sender: Sender, queries: _Side, keys: _Side, compute: Compute) -> None:
    """One pass over the schedule: fetch ahead, compute, return results while the next step computes."""
    rank = sender.axis.rank
    arriving: Transfers | None = None
    returning: Transfers | None = None
    for step in range(schedule.steps + 1):
        arrived = arriving.wait() if arriving is not None else {}
        if step < schedule.steps:
            arriving = _fetch(schedule, step + 1, sender, queries, keys)
        results: dict[int, Bundle] = {}
        owners = schedule.block(step, rank)
        if owners is not None:
            q_run, k_run = (schedule.runs[owner] for owner in owners)
            of_q, of_k = (
                side.inputs if owner == rank else tuple(unpack(arrived[owner], side.forms(len(run))))
                for side, owner, run in zip((queries, keys), owners, (q_run, k_run), strict=True)
            )
            for side, owner, result in zip((queries, keys), owners, compute(of_q, of_k, q_run, k_run), strict=True):
                if owner == rank:
                    side.add(result)
                elif result:
                    forms = zip(result, side.results, strict=True)
                    results[owner] = tuple(x.to(form.dtype) for x, form in forms)
        if step > 0:
            _take_back(schedule, step - 1, rank, queries, keys, returning)
            returning = _give_back(schedule, step, sender, queries, keys, results)
    _take_back(schedule, schedule.steps, rank, queries, keys, returning)


def _users(schedule: Schedule, step: int, rank: int, queries: _Side, keys: _Side) -> list[tuple[int, _Side]]:
    """The ranks that compute with this rank's keys and with its queries in a step."""
    both = ((schedule.key_user(step, rank), keys), (schedule.helper(step, rank), queries))
    return [(user, side) for user, side in both if user is not None] if step else []


def _fetch(schedule: Schedule, step: int, sender: Sender, queries: _Side, keys: _Side) -> Transfers:
    """Send what others need of this rank in a step, and ask for what this rank needs."""
    rank = sender.axis.rank
    sends = {user: pack(side.inputs) for user, side in _users(schedule, step, rank, queries, keys)}
    receives = {
        owner: sum(form.nbytes for form in side.forms(len(schedule.runs[owner])))
        for owner, side in zip(schedule.block(step, rank) or (), (queries, keys), strict=False)
        if owner != rank
    }
    return Transfers(sends, receives, _no_bytes(keys), "fetch", sender)


def _give_back(
    schedule: Schedule, step: int, sender: Sender, queries: _Side, keys: _Side, results: dict[int, Bundle]
) -> Transfers:
    """Send this rank's results for others, and expect what others computed for it."""
    sends = {owner: pack(result) for owner, result in results.items()}
    receives = {
        user: sum(form.nbytes for form in side.results)
        for user, side in _users(schedule, step, sender.axis.rank, queries, keys)
        if side.results
    }
    return Transfers(sends, receives, _no_bytes(keys), "return", sender)


def _take_back(
    schedule: Schedule, step: int, rank: int, queries: _Side, keys: _Side, returning: Transfers | None
) -> None:
    if returning is None:
        return
    arrived = returning.wait()
    for user, side in _users(schedule, step, rank, queries, keys):
        if side.results:
            side.add(tuple(unpack(arrived[user], side.results)))


def _add_to(totals: Bundle, parts: Bundle) -> None:
    for total, part in zip(totals, parts, strict=True):
        total.add_(part)


def _no_bytes(side: _Side) -> Tensor:
    return side.inputs[0].new_empty(0, dtype=torch.uint8)


@lru_cache(maxsize=64)
def _schedule(layout: Layout, mask: MaskSpec) -> Schedule:
    spans = [layout.spans(rank) for rank in range(layout.size)]
    return Schedule(tuple(runs[0] if runs else range(0) for runs in spans), mask)


def illegal(workload: Workload) -> list[str]:
    """Why LightSeq cannot serve the workload."""
    return ring.illegal(workload)


def wire_bytes(workload: Workload, rank: int) -> WireBytes:
    """Bytes leaving ``rank``. A block moves keys and values to the queries, or queries to the keys and results back.

    Forward that is P-1 shards per rank on average for causal attention with as many key/value heads as query heads,
    half of what a plain ring moves, plus the log-sum-exp of blocks computed by helpers.
    """
    if not workload.mask.causal:
        return ring.wire_bytes(workload, rank)
    schedule = _schedule(workload.tokens(), workload.mask)
    e, wide = workload.element_size, max(workload.element_size, 4)
    d, dv = workload.head_dim, workload.v_dim
    mine = workload.batch * len(schedule.runs[rank])
    keys_in, keys_out = workload.kv_heads * (d + dv) * e, workload.kv_heads * (d + dv) * workload.gradient_size
    q_forward, q_backward = workload.heads * d * e, workload.heads * ((d + 2 * dv) * e + wide)
    out_forward, dq = workload.heads * (dv * e + wide), workload.heads * d * workload.gradient_size
    forward = backward = 0
    for step in range(1, schedule.steps + 1):
        if schedule.key_user(step, rank) is not None:
            forward += mine * keys_in
            backward += mine * keys_in
        if schedule.helper(step, rank) is not None:
            forward += mine * q_forward
            backward += mine * q_backward
        owners = schedule.block(step, rank)
        if owners is not None:
            q_owner, k_owner = owners
            if q_owner != rank:
                theirs = workload.batch * len(schedule.runs[q_owner])
                forward += theirs * out_forward
                backward += theirs * dq
            if k_owner != rank:
                backward += workload.batch * len(schedule.runs[k_owner]) * keys_out
    return WireBytes(forward, backward)


METHOD = Method(
    name="lightseq",
    kind="softmax",
    paper="arXiv 2310.03294",
    axes=("ring",),
    layouts=("contiguous",),
    illegal=illegal,
    wire_bytes=wire_bytes,
    attention=attention,
    settings=("ring_gradient_dtype",),
)
