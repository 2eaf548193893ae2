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
from dsp_plugin.kernels.merge import accumulation_dtype
from dsp_plugin.kernels.softmax import block_backward, block_forward
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import ring
from dsp_plugin.methods.block_sums import Gradients, Outputs
from dsp_plugin.methods.inputs import GradientDtype, check_shards, checked, gradient_dtype
from dsp_plugin.methods.method import Method, Where, WireBytes, Workload
from dsp_plugin.methods.places import Places


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

    def seen(self, q_owner: int, k_owner: int) -> tuple[Places, Places]:
        """Of a block, the queries that see a key, and the keys that are seen: each one stretch of a rank's tokens.

        Two ranks share one document at most, and at home every token sees itself.
        """
        queries, keys = self.runs[q_owner], self.runs[k_owner]
        if q_owner == k_owner:
            return Places.whole(len(queries)), Places.whole(len(keys))
        (block,) = blocks(self.mask, queries, keys)
        return Places.stretch_of(block.q), Places.stretch_of(block.k)

    def key_user(self, step: int, rank: int) -> int | None:
        """The rank that fetches the keys of ``rank`` for ``step``."""
        user = rank + step
        return user if user < self.size and self.block(step, user) is not None else None

    def helper(self, step: int, rank: int) -> int | None:
        """The rank that computes a block with the queries of ``rank`` in ``step``."""
        helper = rank + step - self.size
        return helper if helper >= 0 and self.block(step, helper) is not None else None

    def last(self, step: int, rank: int) -> bool:
        """Whether nothing is computed with the queries of ``rank`` after its own block of a step."""
        later = range(step + 1, self.steps + 1)
        own = any((self.block(at, rank) or (None,))[0] == rank for at in later)
        return not own and all(self.helper(at, rank) is None for at in range(1, self.steps + 1))

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
        outputs = Outputs(q, v)

        def compute(queries: Bundle, keys: Bundle, q_run: range, k_run: range) -> tuple[Bundle, Bundle]:
            (their_q,), (their_k, their_v) = queries, keys
            return block_forward(call, their_q, their_k, their_v, q_run, k_run), ()

        def add(places: Places, results: Bundle, _last: bool) -> None:
            # Every query has seen its own key before anything else comes.
            outputs.add(places, *results, again=False, may_be_empty=False)

        wide = accumulation_dtype(q.dtype)
        results = (Form((*q.shape[:3], v.shape[3]), q.dtype), Form((q.shape[0], q.shape[2], q.shape[1]), wide))
        _run(schedule, sender, _Side((q,), results, add), _Side((k, v), (), lambda *_: None), compute)
        out, lse = outputs.total()
        ctx.call, ctx.schedule, ctx.sender, ctx.gradient_dtype = call, schedule, sender.backward(), gradient_dtype
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        travel = ctx.gradient_dtype
        sums = Gradients(q), Gradients(k), Gradients(v)

        def compute(queries: Bundle, keys: Bundle, q_run: range, k_run: range) -> tuple[Bundle, Bundle]:
            (their_q, their_dout, their_out, their_lse), (their_k, their_v) = queries, keys
            saved = their_q, their_k, their_v, their_out, their_lse.contiguous()
            of_q, *of_keys = block_backward(ctx.call, their_dout, *saved, q_run, k_run)
            return (of_q,), tuple(of_keys)

        def adding(*totals: Gradients) -> Add:
            def add(places: Places, parts: Bundle, last: bool) -> None:
                for total, part in zip(totals, parts, strict=True):
                    total.add(places, part, last=last)

            return add

        of_q, *of_keys = sums
        queries = _Side((q, dout, out, lse), (Form(q.shape, travel),), adding(of_q))
        keys = _Side((k, v), (Form(k.shape, travel), Form(v.shape, travel)), adding(*of_keys))
        _run(ctx.schedule, ctx.sender, queries, keys, compute)
        return *(total.total() for total in sums), None, None, None, None


Bundle = tuple[Tensor, ...]
Compute = Callable[[Bundle, Bundle, range, range], tuple[Bundle, Bundle]]


Add = Callable[[Places, Bundle, bool], None]


@dataclass(frozen=True)
class _Side:
    """The query side or the key side of a pass, on the rank that owns the tokens.

    Attributes:
        inputs: what a block needs of this side; ``[B, n, heads, dim]``, or ``[B, H, n]`` for the log-sum-exp.
        results: what a block returns to this side, as it travels.
        add: takes one block's results, of the tokens at some places, and whether they are the last ones, if that is
            known.
    """

    inputs: Bundle
    results: tuple[Form, ...]
    add: Add

    def forms(self, tokens: int) -> list[Form]:
        """The inputs as they come from a rank with that many tokens."""
        return [Form(_of_tokens(x.shape, tokens), x.dtype) for x in self.inputs]


def _token_dim(dims: int) -> int:
    return 1 if dims == 4 else 2


def _of_tokens(shape: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    dim = _token_dim(len(shape))
    return (*shape[:dim], tokens, *shape[dim + 1 :])


def _spread(result: Tensor, places: Places, tokens: int) -> Tensor:
    """A result of some tokens as that of all: what saw nothing has an output and gradients of 0, and an lse of -inf."""
    if places.covers(tokens):
        return result
    dim = _token_dim(result.dim())
    whole = result.new_full(_of_tokens(result.shape, tokens), 0.0 if dim == 1 else -torch.inf)
    places.pick(whole, dim).copy_(result)
    return whole


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
            seen = schedule.seen(*owners)
            runs = [schedule.runs[owner] for owner in owners]
            inputs = []
            for side, owner, run, places in zip((queries, keys), owners, runs, seen, strict=True):
                whole = side.inputs if owner == rank else unpack(arrived[owner], side.forms(len(run)))
                inputs.append(tuple(places.pick(x, _token_dim(x.dim())) for x in whole))
            of_q, of_k = inputs
            q_run, k_run = (run[stretch] for run, places in zip(runs, seen, strict=True) for stretch in places)
            found = compute(of_q, of_k, q_run, k_run)
            for side, owner, run, places, result in zip((queries, keys), owners, runs, seen, found, strict=True):
                if owner == rank:
                    side.add(places, result, side is queries and schedule.last(step, rank))
                elif result:
                    results[owner] = tuple(_spread(x, places, len(run)) for x in result)
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
    forms_of = dict(zip(schedule.block(step, sender.axis.rank) or (), (queries.results, keys.results), strict=False))
    sends = {owner: _packed(result, forms_of[owner]) for owner, result in results.items()}
    receives = {
        user: sum(form.nbytes for form in side.results)
        for user, side in _users(schedule, step, sender.axis.rank, queries, keys)
        if side.results
    }
    return Transfers(sends, receives, _no_bytes(keys), "return", sender)


def _packed(result: Bundle, forms: tuple[Form, ...]) -> Tensor:
    """A result as it travels; one that another dtype is wanted of is read and written once."""
    dtypes = {form.dtype for form in forms}
    if len(dtypes) > 1 or dtypes == {x.dtype for x in result}:
        return pack([x.to(form.dtype) for x, form in zip(result, forms, strict=True)])
    room = result[0].new_empty(sum(x.numel() for x in result), dtype=forms[0].dtype)
    for part, x in zip(room.split([x.numel() for x in result]), result, strict=True):
        part.view(x.shape).copy_(x)
    return room.view(torch.uint8)


def _take_back(
    schedule: Schedule, step: int, rank: int, queries: _Side, keys: _Side, returning: Transfers | None
) -> None:
    if returning is None:
        return
    arrived = returning.wait()
    for user, side in _users(schedule, step, rank, queries, keys):
        if side.results:
            side.add(Places.whole(len(schedule.runs[rank])), tuple(unpack(arrived[user], side.results)), False)


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
