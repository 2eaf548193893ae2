"""Local softmax attention on the kernels of the table: whole sequences with autograd, and blocks for ring attention.

Shapes: q ``[B, n, H, D]``, k ``[B, m, K, D]``, v ``[B, m, K, Dv]``, out ``[B, n, H, Dv]``, lse ``[B, H, n]`` (fp32,
fp64 for fp64 inputs or the reference kernel; -inf with out 0 where a query sees no key).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dsp_plugin.derivatives import once_differentiable, refuse_transforms
from dsp_plugin.kernels.blocks import Block, blocks
from dsp_plugin.kernels.call import AttentionCall, prepare
from dsp_plugin.kernels.counter import record
from dsp_plugin.kernels.kernel import BlockSpec, VarlenKernel
from dsp_plugin.kernels.rows import row_by_row
from dsp_plugin.kernels.segments import Segments, packed_segments
from dsp_plugin.kernels.spec import AttentionSpec


def block_forward(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, q_positions: range, k_positions: range
) -> tuple[Tensor, Tensor]:
    """Attention of a run of queries to a run of keys, without autograd.

    Args:
        call: what to compute.
        q, k, v: the runs' tensors.
        q_positions, k_positions: their global positions, in order; both contiguous, or strided alike.

    Returns:
        ``(out, lse)``, to be merged with those of other keys by `dsp_plugin.kernels.merge.merge_`; ``out`` is in the
        kernel's `result_dtype`, so that a kernel that has it in fp32 loses nothing before it is merged.
    """
    assert q.shape[1] == len(q_positions)
    assert k.shape[1] == len(k_positions)
    segments = _as_segments(call, q_positions, k_positions)
    if segments is not None:
        return segments_forward(call, q, k, v, segments)
    return _forward(call, q, k, v, partial(_blocks, q_positions=q_positions, k_positions=k_positions))


def segments_forward(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """The same of segments, in one kernel call where the kernel can; the mask of ``call`` is not asked.

    Args:
        call: what to compute.
        q, k, v: the tensors that the segments cover; all batch rows have the same segments.
        segments: which queries see which keys.

    Returns:
        ``(out, lse)``, as those of `block_forward`.
    """
    _check_lengths(q, k, segments)
    kernel = call.kernel
    if isinstance(kernel, VarlenKernel) and _at_once(call, q, segments):

        def attend(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            record(kernel.name, "forward")
            return kernel.varlen_forward(q, k, v, segments, call.scale)

        with torch.autocast(q.device.type, enabled=False):
            return _evenly_forward(attend, call, q, k, v)
    return _forward(call, q, k, v, partial(_parts, segments=segments))


def block_backward(
    call: AttentionCall,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_positions: range,
    k_positions: range,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of the gradients, given the ``out`` and ``lse`` of attention to *all* keys.

    Returns:
        ``(dq, dk, dv)``, shaped like q, k and v, in the kernel's `result_dtype`. Summing dq over blocks of keys, and
        dk and dv over blocks of queries, gives the gradients of the whole.
    """
    segments = _as_segments(call, q_positions, k_positions)
    if segments is not None:
        return segments_backward(call, dout, q, k, v, out, lse, segments)
    work = partial(_blocks, q_positions=q_positions, k_positions=k_positions)
    return _backward(call, dout, q, k, v, out, lse, work)


def segments_backward(
    call: AttentionCall, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of `segments_forward`, in one kernel call where the kernel can."""
    _check_lengths(q, k, segments)
    kernel = call.kernel
    if isinstance(kernel, VarlenKernel) and _at_once(call, q, segments):

        def differentiate(
            call: AttentionCall, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            record(kernel.name, "backward")
            return kernel.varlen_backward(dout, q, k, v, out, lse, segments, call.scale)

        with torch.autocast(q.device.type, enabled=False):
            return _evenly_backward(differentiate, call, dout, q, k, v, out, lse)
    return _backward(call, dout, q, k, v, out, lse, partial(_parts, segments=segments))


def _check_lengths(q: Tensor, k: Tensor, segments: Segments) -> None:
    assert (q.shape[1], k.shape[1]) == (segments.q_borders[-1], segments.k_borders[-1])


def _at_once(call: AttentionCall, q: Tensor, segments: Segments) -> bool:
    """Whether a kernel with varlen calls takes these: some work, and none that depends on global positions.

    A single segment is a block, of which kernels take batch rows that do not lie one behind the other.
    """
    return bool(call.spec.dropout_p == 0.0 and q.shape[0] and q.shape[2] and len(segments.q_borders) > 2)


def _as_segments(call: AttentionCall, q_positions: range, k_positions: range) -> Segments | None:
    if q_positions != k_positions or not isinstance(call.kernel, VarlenKernel) or call.spec.dropout_p:
        return None
    return packed_segments(call.spec.mask, q_positions)


Work = list[tuple[Block, BlockSpec]]
WorkOf = Callable[[AttentionCall, Tensor], Work]


def _blocks(call: AttentionCall, q: Tensor, q_positions: range, k_positions: range) -> Work:
    found = blocks(call.spec.mask, q_positions, k_positions) if q.shape[0] and q.shape[2] else ()
    return [(block, call.of_block(block, q_positions, k_positions)) for block in found]


def _parts(call: AttentionCall, q: Tensor, segments: Segments) -> Work:
    if not (q.shape[0] and q.shape[2]):
        return []
    if not call.spec.dropout_p:
        return [(part, BlockSpec(part.band, call.scale)) for part in segments.parts]
    assert segments.blocks is not None, "dropout depends on where tokens are"
    positions = segments.blocks()
    return [
        (part, BlockSpec(part.band, call.scale, call.spec.dropout(*runs)))
        for part, runs in zip(segments.parts, positions, strict=True)
    ]


def _forward(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, work_of: WorkOf) -> tuple[Tensor, Tensor]:
    def attend(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        def one(block: Block, spec: BlockSpec) -> tuple[Tensor, Tensor]:
            record(call.kernel.name, "forward")
            return call.kernel.forward(q[:, block.q], k[:, block.k], v[:, block.k], spec)

        work = work_of(call, q)
        if _covers_all(work, q, k):
            return one(*work[0])
        out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=call.kernel.result_dtype(q.dtype), device=q.device)
        lse_shape = (q.shape[0], q.shape[2], q.shape[1])
        lse = torch.full(lse_shape, -torch.inf, dtype=call.kernel.lse_dtype(q.dtype), device=q.device)
        for block, spec in work:
            out[:, block.q], lse[:, :, block.q] = one(block, spec)
        return out, lse

    with torch.autocast(q.device.type, enabled=False):
        return _evenly_forward(attend, call, q, k, v)


def _backward(
    call: AttentionCall, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, work_of: WorkOf
) -> tuple[Tensor, Tensor, Tensor]:
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
        dq, dk, dv = _zeros(call, q, k, v)
        for block, spec in work:
            dq[:, block.q], dk[:, block.k], dv[:, block.k] = one(block, spec)
        return dq, dk, dv

    with torch.autocast(q.device.type, enabled=False):
        return _evenly_backward(differentiate, call, dout, q, k, v, out, lse)


def _covers_all(work: Work, q: Tensor, k: Tensor) -> bool:
    return len(work) == 1 and (work[0][0].rows, work[0][0].cols) == (q.shape[1], k.shape[1])


def _zeros(call: AttentionCall, *like: Tensor) -> list[Tensor]:
    return [torch.zeros(x.shape, dtype=call.kernel.result_dtype(x.dtype), device=x.device) for x in like]


def _evenly_forward(
    attend: Callable[[AttentionCall, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    call: AttentionCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> tuple[Tensor, Tensor]:
    """In turns where kv heads do not serve equally many query heads."""
    if call.is_even or not q.shape[2]:
        return attend(call, q, k, v)
    parts = [attend(even, q[:, :, heads], k[:, :, kv], v[:, :, kv]) for even, heads, kv in call.evenly()]
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 1)


def _evenly_backward(
    differentiate: Callable[..., tuple[Tensor, Tensor, Tensor]],
    call: AttentionCall,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if call.is_even or not q.shape[2]:
        return differentiate(call, dout, q, k, v, out, lse)
    dq, dk, dv = _zeros(call, q, k, v)
    for even, heads, kv in call.evenly():
        keys, of_queries = (k[:, :, kv], v[:, :, kv]), (out[:, :, heads], lse[:, heads])
        shares = differentiate(even, dout[:, :, heads], q[:, :, heads], *keys, *of_queries)
        dq[:, :, heads], dk[:, :, kv], dv[:, :, kv] = shares
    return dq, dk, dv


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
        out, lse = block_forward(call, q, k, v, range(q.shape[1]), range(k.shape[1]))
        out = out.to(q.dtype)
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _dlse: None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        runs = range(q.shape[1]), range(k.shape[1])
        dq, dk, dv = block_backward(ctx.call, dout, q, k, v, out, lse, *runs)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of whole sequences that this rank holds, differentiable in q, k and v; lse is not.

    Positions start at 0 on both sides, also where there are not as many keys as queries.
    """
    refuse_transforms("attention", q, k, v)
    out, lse = _Attention.apply(q, k, v, call)
    return out, lse


def autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that torch's own attention would compute in: rotary embeddings often leave q and k in fp32."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = ..., *, return_lse: Literal[False] = False
) -> Tensor: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec = ..., *, return_lse: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec | None = None, *, return_lse: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over a whole sequence; in a module that `parallelize` has sharded, over a sharded one.

    Args:
        q: ``[B, Lq, H, D]``; k: ``[B, Lk, K, D]``; v: ``[B, Lk, K, Dv]``, one dtype. Under autocast they are cast to
            its dtype first. Positions start at 0 on both sides, also when Lq and Lk differ: causal then is ``j <= i``.
        spec: what to compute; unmasked attention if None. A packed mask's borders end at ``max(Lq, Lk)``, and are those
            of the whole sequence also where it is sharded.
        return_lse: also return lse ``[B, H, Lq]``, which is not differentiable. Not where it is sharded.

    Returns:
        out ``[B, Lq, H, Dv]`` in the dtype of q; 0, with gradient 0, where a query sees no key.

    Raises:
        SequenceParallelConfigError: heads, document borders or the kernel's name are illegal.
        UnsupportedError: mixed dtypes, or the forced kernel cannot serve such tensors.
    """
    if has_torch_function((q, k, v)):
        overloaded: Callable[..., Any] = attention
        result: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            overloaded, (q, k, v), q, k, v, spec, return_lse=return_lse
        )
        return result

    def of_rows(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
        call = prepare(q, k, v, spec)
        spec.mask.documents(length)
        return attend(q, k, v, call)

    length = max(q.shape[1], k.shape[1])
    out, lse = row_by_row(of_rows, map(autocast, (q, k, v)), spec or AttentionSpec(), length)
    return (out, lse) if return_lse else out
