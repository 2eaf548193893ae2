"""Blocks of a mask, one kernel call each, and heads in turns where kv heads do not serve equally many query heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsp_plugin.kernels.blocks import Block
from dsp_plugin.kernels.call import AttentionCall
from dsp_plugin.kernels.counter import record
from dsp_plugin.kernels.kernel import BlockSpec

Work = list[tuple[Block, BlockSpec]]
# Of a call that shares heads evenly and its queries.
WorkOf = Callable[[AttentionCall, Tensor], Work]


def forward(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, work_of: WorkOf) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of blocks that share no queries; 0 and -inf for queries that are in none."""

    def attend(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        def one(block: Block, spec: BlockSpec) -> tuple[Tensor, Tensor]:
            record(call.kernel.name, "forward")
            return call.kernel.forward(q[:, block.q], k[:, block.k], v[:, block.k], spec)

        work = work_of(call, q)
        if _covers_all(work, q, k):
            return one(*work[0])
        out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=call.kernel.result_dtype(q.dtype))
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=call.kernel.lse_dtype(q.dtype))
        if sum(block.rows for block, _ in work) < q.shape[1]:
            out.zero_()
            lse.fill_(-torch.inf)
        for block, spec in work:
            out[:, block.q], lse[:, :, block.q] = one(block, spec)
        return out, lse

    return evenly_forward(attend, call, q, k, v)


def backward(
    call: AttentionCall, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, work_of: WorkOf
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` of blocks that share neither queries nor keys; 0 for what is in none."""

    def differentiate(
        call: AttentionCall, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        def one(block: Block, spec: BlockSpec) -> tuple[Tensor, Tensor, Tensor]:
            record(call.kernel.name, "backward")
            rows, cols = block.q, block.k
            tensors = dout[:, rows], q[:, rows], k[:, cols], v[:, cols], out[:, rows], lse[:, :, rows]
            return call.kernel.backward(*tensors, spec)

        work = work_of(call, q)
        if _covers_all(work, q, k):
            return one(*work[0])
        dq, dk, dv = (x.new_empty(x.shape, dtype=call.kernel.result_dtype(x.dtype)) for x in (q, k, v))
        if sum(block.rows for block, _ in work) < q.shape[1]:
            dq.zero_()
        if sum(block.cols for block, _ in work) < k.shape[1]:
            dk.zero_()
            dv.zero_()
        for block, spec in work:
            dq[:, block.q], dk[:, block.k], dv[:, block.k] = one(block, spec)
        return dq, dk, dv

    return evenly_backward(differentiate, call, dout, q, k, v, out, lse)


def _covers_all(work: Work, q: Tensor, k: Tensor) -> bool:
    return len(work) == 1 and (work[0][0].rows, work[0][0].cols) == (q.shape[1], k.shape[1])


def evenly_forward(
    attend: Callable[[AttentionCall, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    call: AttentionCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    """What ``attend`` returns, in turns where kv heads do not serve equally many query heads; outside autocast."""
    with torch.autocast(q.device.type, enabled=False):
        if call.is_even or not q.shape[2]:
            return attend(call, q, k, v)
        parts = [attend(even, q[:, :, heads], k[:, :, kv], v[:, :, kv]) for even, heads, kv in call.evenly()]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 1)


def evenly_backward(
    differentiate: Callable[..., tuple[Tensor, Tensor, Tensor]],
    call: AttentionCall,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``differentiate`` returns, likewise."""
    with torch.autocast(q.device.type, enabled=False):
        if call.is_even or not q.shape[2]:
            return differentiate(call, dout, q, k, v, out, lse)
        dq, dk, dv = (x.new_zeros(x.shape, dtype=call.kernel.result_dtype(x.dtype)) for x in (q, k, v))
        for even, heads, kv in call.evenly():
            keys, of_queries = (k[:, :, kv], v[:, :, kv]), (out[:, :, heads], lse[:, heads])
            shares = differentiate(even, dout[:, :, heads], q[:, :, heads], *keys, *of_queries)
            dq[:, :, heads], dk[:, :, kv], dv[:, :, kv] = shares
    return dq, dk, dv
