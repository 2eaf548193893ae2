"""USP: Ulysses inside, ring outside, P = U * R (arXiv 2405.07719).

    q, k, v  --all-to-all on the Ulysses axis-->  some heads of all tokens of the U ranks
    ring attention among the R rings' worth of tokens
    out      --all-to-all on the Ulysses axis-->  all heads of the local tokens

Layouts are those of all P ranks, whichever ranks the Ulysses axis joins: the gathered tokens are put into global
order, and the ring works on the runs that they form.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from dsp_plugin.comm.wire import Sender
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.kernels.call import AttentionCall
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import ring, ulysses
from dsp_plugin.methods.head_exchange import HEAD_DIM, HeadExchange
from dsp_plugin.methods.head_partition import head_partition
from dsp_plugin.methods.head_rounds import RoundBudget, choose
from dsp_plugin.methods.in_rounds import attention_in_rounds
from dsp_plugin.methods.inputs import GradientDtype, check_shards, checked, gradient_dtype
from dsp_plugin.methods.method import Method, Where, WireBytes, Workload
from dsp_plugin.methods.ring_schedule import RingSchedule

Members = tuple[tuple[int, ...], ...]
Runs = tuple[range, ...]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    what: AttentionSpec,
    where: Where,
    ring_gradient_dtype: GradientDtype = "fp32",
    attention_rounds: int | RoundBudget = 1,
) -> Tensor:
    """Exact attention over a sequence sharded along dim 1; arguments and result as for `ring.attention`.

    Args:
        attention_rounds: in how many rounds of heads, or what one of them may gather, see `in_rounds`. The query heads
            of one key/value head stay in one round, or the ring would pass its keys on in several.

    Raises:
        SequenceParallelConfigError: shapes, head counts or rounds do not fit.
    """
    groups, layout = where.groups, where.layout
    check_shards(q, k, v, layout, groups.sp)
    heads, kv_heads, size = q.shape[HEAD_DIM], k.shape[HEAD_DIM], groups.ulysses.size
    reasons = illegal(Workload(layout.size, heads, kv_heads, layout.length, layout=layout.kind, ulysses_size=size))
    if reasons:
        raise SequenceParallelConfigError("usp cannot serve this attention: " + " ".join(reasons))
    call = checked(q, k, v, what, layout)
    part = head_partition(heads, kv_heads, size)
    members = _members(groups)
    gathered = tuple(gathered_tokens(layout, ranks) for ranks in members)
    exchange = HeadExchange(groups.ulysses, "usp", part, gathered[groups.ring.rank][1])
    most = max(sum(map(len, runs)) for runs, _ in gathered)
    rounds = choose(attention_rounds, q, v, part, most, whole_groups=True)
    sender = Sender(groups.ring, "usp", "forward")
    travel = gradient_dtype(ring_gradient_dtype, q.dtype)
    schedule = _schedule(layout, members, what.mask)
    if rounds.count > 1:
        return attention_in_rounds(q, k, v, call, rounds, exchange, _Along(schedule, sender, travel))
    q, k, v = exchange.scatter(q, k, v)
    narrowed = call.narrow(exchange.heads, exchange.q_per_kv)
    return exchange.gather(ring.ring_attention(q, k, v, narrowed, schedule, sender, travel))


@dataclass(frozen=True)
class _Along:
    """Attention of gathered heads along a ring."""

    schedule: RingSchedule
    sender: Sender
    gradient_dtype: torch.dtype

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
        return ring.ring_forward(q, k, v, call.within_documents(), self.schedule, self.sender)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        way = self.schedule, self.sender.backward(), self.gradient_dtype
        return ring.ring_backward(dout, q, k, v, out, lse, call.within_documents(), *way)


def _members(groups: SequenceParallelGroups) -> Members:
    """For every place on the ring, the sequence ranks of the Ulysses group there, in Ulysses order."""
    sp, here = groups.sp.ranks, groups.sp.ranks[groups.sp.rank]
    mine = [sp.index(rank) for rank in groups.ulysses.ranks]
    steps = [sp.index(rank) - sp.index(here) for rank in groups.ring.ranks]
    return tuple(tuple(rank + step for rank in mine) for step in steps)


@lru_cache(maxsize=64)
def gathered_tokens(layout: Layout, ranks: tuple[int, ...]) -> tuple[Runs, tuple[Runs, ...]]:
    """The tokens of several ranks put in global order.

    Returns:
        Their global positions as maximal runs, and for every rank where its local tokens stand among them.
    """
    ordered = sorted((run for rank in ranks for run in layout.spans(rank)), key=lambda run: run.start)
    runs: list[range] = []
    for run in ordered:
        if runs and runs[-1].stop == run.start and runs[-1].step == run.step == 1:
            runs[-1] = range(runs[-1].start, run.stop)
        else:
            runs.append(run)
    ends = accumulate(map(len, ordered))
    places = {run: range(end - len(run), end) for run, end in zip(ordered, ends, strict=True)}
    return tuple(runs), tuple(tuple(places[run] for run in layout.spans(rank)) for rank in ranks)


@lru_cache(maxsize=64)
def _schedule(layout: Layout, members: Members, mask: MaskSpec) -> RingSchedule:
    """Of the ring whose places hold the tokens of the given ranks, computed once per layout, grid and mask."""
    return RingSchedule(tuple(gathered_tokens(layout, ranks)[0] for ranks in members), mask)


def illegal(workload: Workload) -> list[str]:
    """Why USP cannot serve the workload."""
    inner = workload.ulysses_size or workload.size
    if workload.size % inner:
        return [f"ulysses_size={inner} does not divide size={workload.size}: choose a divisor."]
    return ulysses.illegal(replace(workload, size=inner))


def wire_bytes(workload: Workload, rank: int) -> WireBytes:
    """Bytes leaving sequence rank ``rank``, Ulysses ranks adjacent: those of both methods, with its share of heads."""
    inner = workload.ulysses_size or workload.size
    outer = workload.size // inner
    tokens = workload.tokens()
    place, here = divmod(rank, inner)
    members = tuple(tuple(range(start * inner, (start + 1) * inner)) for start in range(outer))
    part = head_partition(workload.heads, workload.kv_heads, inner)
    around = ulysses.wire_bytes_of_shard(
        replace(workload, size=inner), here, [tokens.sizes[member] for member in members[place]]
    )
    schedule = _schedule(tokens, members, workload.mask)
    along = ring.wire_bytes_of_schedule(replace(workload, kv_heads=len(part.keys[here])), schedule, place)
    return WireBytes(around.forward + along.forward, around.backward + along.backward)


METHOD = Method(
    name="usp",
    kind="softmax",
    paper="arXiv 2405.07719",
    axes=("ulysses", "ring"),
    layouts=("zigzag", "contiguous"),
    illegal=illegal,
    wire_bytes=wire_bytes,
    attention=attention,
    settings=("ring_gradient_dtype", "attention_rounds"),
)
