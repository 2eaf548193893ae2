"""LASP: linear attention over a sharded sequence, whose traffic does not grow with it (arXiv 2404.02882, 2502.07563).

A rank's tokens act on the state that comes from the left as one stretch (see `kernels.linear_state`). Ranks exchange
summaries of their stretches, a state of K x V per head each, and compute everything else by themselves. How they
exchange is `state_exchange`; that there is more than one way changes time, and bytes by a factor, never results.

Tokens must be in order on the ranks. Another order, which softmax layers of the same model may want, is undone before
and redone after, at the price of two all-to-alls of the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.collectives import summed
from dsp_plugin.comm.relayout import relayout, relayout_bytes
from dsp_plugin.comm.wire import Sender
from dsp_plugin.integers import kept_on_device
from dsp_plugin.kernels.linear import attend, check, decay_of
from dsp_plugin.kernels.linear_bidirectional import bidirectional
from dsp_plugin.kernels.linear_chunks import Inputs
from dsp_plugin.kernels.merge import accumulation_dtype
from dsp_plugin.layout import Layout, shard_sizes
from dsp_plugin.mask import document_starts
from dsp_plugin.methods.inputs import SEQUENCE_DIM, check_length
from dsp_plugin.methods.method import Method, Where, WireBytes, Workload
from dsp_plugin.methods.state_exchange import METHOD as NAME
from dsp_plugin.methods.state_exchange import choose_exchange, state_exchange


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    where: Where,
    causal: bool = True,
    cu_seqlens: Iterable[int] | Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    exchange: str = "auto",
    kernel: str = "auto",
) -> Any:
    """Exact linear attention over a sequence sharded along dim 1.

    Args:
        q, k, v, g, beta: as for `kernels.linear.linear_attention`, this rank's tokens under the layout.
        initial_state: ``[B, H, K, V]`` before the first token of the sequence, alike on every rank. Only the first rank
            uses it and has a gradient for it; the others' is zero, as the sum over ranks wants it.
        where: the tokens are; of the groups the LASP axis is used, whose size must be the layout's. Orders other than
            contiguous are converted.
        causal, scale, kernel: as there.
        cu_seqlens: document borders in global positions.
        output_final_state: also return the state after this rank's last token (contiguous).
        exchange: how states travel: ``ring``, ``allgather``, ``scan``, or ``auto`` for the least time by size.

    Returns:
        ``[B, n, H, V]``, and with ``output_final_state`` a state ``[B, H, K, V]`` in fp32.

    Raises:
        SequenceParallelConfigError: shapes or document borders do not fit.
        UnsupportedError: not causal with a decay or states, or the kernel cannot run here.
    """
    axis, layout = where.groups.lasp, where.layout
    inputs = Inputs(q, k, v, g, beta)
    check(inputs, initial_state, causal=causal, output_final_state=output_final_state, kernel=kernel)
    check_length(q, f"q {tuple(q.shape)}, v {tuple(v.shape)}", layout, axis)
    borders = document_starts(cu_seqlens, layout.length)
    contiguous = _in_order(layout)
    inputs = _moved(inputs, layout, contiguous, axis)
    if causal:
        states = state_exchange(*_exchange_of(inputs, exchange, axis, contiguous, borders))
        starts = _local_starts(borders, contiguous, axis.rank)
        out, state = attend(inputs, initial_state, states, scale=scale, starts=starts, kernel=kernel)
    else:
        out, state = _without_order(inputs, contiguous, borders, scale, axis), None
    (out,) = relayout((out,), SEQUENCE_DIM, contiguous, layout, axis=axis, method=NAME)
    return (out, state) if output_final_state else out


def _in_order(layout: Layout) -> Layout:
    return layout if layout.kind == "contiguous" else Layout.of_sizes(layout.sizes)


def _moved(inputs: Inputs, source: Layout, target: Layout, axis: Axis) -> Inputs:
    """The inputs in another layout; decays per head have no tokens."""
    names = [name for name, x in inputs._asdict().items() if x is not None and x.dim() > 1]
    moved = relayout([getattr(inputs, name) for name in names], SEQUENCE_DIM, source, target, axis=axis, method=NAME)
    return inputs._replace(**dict(zip(names, moved, strict=True)))


def _local_starts(borders: tuple[int, ...], layout: Layout, rank: int) -> tuple[int, ...]:
    """Offsets in the rank's shard at which documents start."""
    return tuple(border - span.start for span in layout.spans(rank) for border in borders if border in span)


def _exchange_of(
    inputs: Inputs, exchange: str, axis: Axis, layout: Layout, borders: tuple[int, ...]
) -> tuple[str, Axis, tuple[bool, ...], Tensor | None, bool]:
    """What `state_exchange` takes."""
    q, _, v, g, beta = inputs
    batch, _, heads, v_dim = v.shape
    dtype = accumulation_dtype(v.dtype)
    state_bytes = batch * heads * q.shape[-1] * v_dim * dtype.itemsize
    transition_bytes = _transition_bytes(decay_of(g, beta), batch, heads, q.shape[-1], dtype.itemsize)
    name = choose_exchange(exchange, state_bytes, transition_bytes, v_dim, axis.size)
    forgetful = tuple(bool(_local_starts(borders, layout, rank)) for rank in range(axis.size))
    if transition_bytes or g is None:
        return name, axis, forgetful, None, not transition_bytes
    (lengths,) = _lengths(layout.sizes, device=v.device)
    known = (g.detach().double().view(1, 1, -1, 1, 1) * lengths.view(-1, 1, 1, 1, 1)).exp()
    return name, axis, forgetful, known.to(dtype), False


@kept_on_device
def _lengths(sizes: tuple[int, ...]) -> tuple[NDArray[np.float64]]:
    return (np.array(sizes, dtype=np.float64),)


def _transition_bytes(decay: str, batch: int, heads: int, k_dim: int, itemsize: int) -> int:
    """Of what other ranks cannot know of a stretch: see `state_exchange`."""
    if decay in ("none", "head"):
        return 0
    entries = {"scalar": 1, "vector": k_dim}.get(decay, k_dim * k_dim)
    return batch * heads * entries * itemsize


def _without_order(inputs: Inputs, layout: Layout, borders: tuple[int, ...], scale: float | None, axis: Axis) -> Tensor:
    q, k, v, _, _ = inputs
    starts = _local_starts(borders, layout, axis.rank)
    local = sorted({0, *starts, q.shape[SEQUENCE_DIM]})
    if len(local) == 1:
        local = [0, 0]
    parts = _shared_documents(borders, layout, axis.rank)

    def reduce(sums: Tensor, phase: Any) -> Tensor:
        count = len(_crossing(borders, layout))
        if not count:
            return sums
        shared = sums.new_zeros(count, *sums.shape[1:])
        for document, part in parts:
            shared[document] = sums[part]
        total = summed(shared, Sender(axis, NAME, phase))
        sums = sums.clone()
        for document, part in parts:
            sums[part] = total[document]
        return sums

    return bidirectional(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, tuple(local), reduce)


def _documents(borders: tuple[int, ...], length: int) -> list[range]:
    return [range(a, b) for a, b in pairwise((0, *borders, length))]


def _crossing(borders: tuple[int, ...], layout: Layout) -> list[range]:
    """The documents that more than one rank holds a part of."""
    shards = [span for rank in range(layout.size) for span in layout.spans(rank)]
    return [
        document
        for document in _documents(borders, layout.length)
        if sum(1 for shard in shards if shard.start < document.stop and document.start < shard.stop) > 1
    ]


def _shared_documents(borders: tuple[int, ...], layout: Layout, rank: int) -> list[tuple[int, int]]:
    """Of the documents that cross ranks, those with a part here: (index among them, index of the part here)."""
    here = [
        document
        for document in _documents(borders, layout.length)
        for span in layout.spans(rank)
        if span.start < document.stop and document.start < span.stop
    ]
    crossing = _crossing(borders, layout)
    return [(crossing.index(document), part) for part, document in enumerate(here) if document in crossing]


def illegal(workload: Workload) -> list[str]:
    """Why LASP cannot serve the workload."""
    reasons = []
    if workload.heads < 1 or workload.kv_heads < 1 or workload.heads % workload.kv_heads:
        reasons.append(
            f"heads={workload.heads} value heads are not a multiple of kv_heads={workload.kv_heads} query and key "
            "heads: fix the model's head counts."
        )
    if workload.mask.window is not None:
        reasons.append(f"window={workload.mask.window}: linear attention has no window. Use a decay instead.")
    return reasons


def wire_bytes(workload: Workload, rank: int) -> WireBytes:
    """Bytes leaving ``rank``: see `state_exchange`, and `relayout` for layouts that are not contiguous.

    Of a causal workload (``workload.mask.causal``) states travel; without a mask, the sums of the documents that cross
    ranks are added up by an all-reduce.
    """
    size, itemsize = workload.size, max(workload.element_size, 4)
    state = workload.batch * workload.heads * workload.head_dim * workload.v_dim * itemsize
    tokens = workload.tokens()
    moved = _relayout_bytes(workload, tokens, rank)
    if size == 1:
        return WireBytes(0, 0)
    borders = document_starts(workload.mask.cu_seqlens, workload.length)
    if not workload.mask.causal:
        shared = len(_crossing(borders, _in_order(tokens))) * state // itemsize
        own = shard_sizes(shared, size)[rank]
        reduced = (shared - own + (size - 1) * own) * itemsize
        return WireBytes(reduced + moved.forward, reduced + moved.backward)
    sent = _transition_bytes(workload.decay, workload.batch, workload.heads, workload.head_dim, itemsize)
    name = choose_exchange(workload.exchange, state, sent, workload.v_dim, size)
    if name == "allgather":
        forward, backward = (size - 1) * (state + sent), (size - 1) * state
    else:
        forward, backward = (state if rank < size - 1 else 0), (state if rank > 0 else 0)
    return WireBytes(forward + moved.forward, backward + moved.backward)


def _relayout_bytes(workload: Workload, tokens: Layout, rank: int) -> WireBytes:
    contiguous = _in_order(tokens)
    gates = {"scalar": 1, "delta": 1, "vector": workload.head_dim, "gated-delta": 2, "kda": 1 + workload.head_dim}
    queries = 2 * workload.kv_heads * workload.head_dim
    out = workload.heads * workload.v_dim * workload.element_size
    given = out + queries * workload.element_size
    given += workload.heads * gates.get(workload.decay, 0) * workload.gate_size
    there = relayout_bytes(tokens, contiguous, rank, workload.batch)
    back = relayout_bytes(contiguous, tokens, rank, workload.batch)
    return WireBytes(there * given + back * out, back * given + there * out)


METHOD = Method(
    name=NAME,
    kind="linear",
    paper="arXiv 2404.02882, 2502.07563, 2507.01004",
    axes=("ulysses", "ring"),
    layouts=("contiguous", "zigzag"),
    illegal=illegal,
    wire_bytes=wire_bytes,
    attention=attention,
    settings=("exchange",),
)
