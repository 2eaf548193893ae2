"""Local softmax attention on the kernels of the table: whole sequences with autograd, and blocks for ring attention.

Shapes: q ``[B, n, H, D]``, k ``[B, m, K, D]``, v ``[B, m, K, Dv]``, out ``[B, n, H, Dv]``, lse ``[B, H, n]`` (fp32,
fp64 for fp64 inputs or the reference kernel; -inf with out 0 where a query sees no key).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dsp_plugin.derivatives import once_differentiable, refuse_transforms
from dsp_plugin.kernels import one_by_one
from dsp_plugin.kernels.blocks import blocks
from dsp_plugin.kernels.call import AttentionCall, prepare
from dsp_plugin.kernels.counter import record
from dsp_plugin.kernels.kernel import BlockSpec, VarlenKernel
from dsp_plugin.kernels.segments import Segments, packed_rows, packed_segments
from dsp_plugin.kernels.spec import AttentionSpec

# A dimension of the grid that flash kernels are launched with (csrc/flash_attn/src/flash_fwd_launch_template.h).
_MOST_SEGMENTS = 65535


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
    if call.spec.cu_seqlens_by_row is not None:
        return _rows_forward(call, q, k, v, q_positions, k_positions)
    segments = _as_segments(call, q_positions, k_positions)
    if segments is not None:
        return segments_forward(call, q, k, v, segments)
    return one_by_one.forward(call, q, k, v, partial(_blocks, q_positions=q_positions, k_positions=k_positions))


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
    kernel = _at_once(call, q, segments)
    if kernel is not None:

        def attend(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            record(kernel.name, "forward")
            return kernel.varlen_forward(q, k, v, segments, call.scale)

        return one_by_one.evenly_forward(attend, call, q, k, v)
    return one_by_one.forward(call, q, k, v, partial(_parts, segments=segments))


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
    if call.spec.cu_seqlens_by_row is not None:
        return _rows_backward(call, dout, q, k, v, out, lse, q_positions, k_positions)
    segments = _as_segments(call, q_positions, k_positions)
    if segments is not None:
        return segments_backward(call, dout, q, k, v, out, lse, segments)
    work = partial(_blocks, q_positions=q_positions, k_positions=k_positions)
    return one_by_one.backward(call, dout, q, k, v, out, lse, work)


def segments_backward(
    call: AttentionCall, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of `segments_forward`, in one kernel call where the kernel can."""
    _check_lengths(q, k, segments)
    kernel = _at_once(call, q, segments)
    if kernel is not None:

        def differentiate(
            call: AttentionCall, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            record(kernel.name, "backward")
            return kernel.varlen_backward(dout, q, k, v, out, lse, segments, call.scale)

        return one_by_one.evenly_backward(differentiate, call, dout, q, k, v, out, lse)
    return one_by_one.backward(call, dout, q, k, v, out, lse, partial(_parts, segments=segments))


def _check_lengths(q: Tensor, k: Tensor, segments: Segments) -> None:
    assert (q.shape[1], k.shape[1]) == (segments.q_borders[-1], segments.k_borders[-1])


def _varlen(call: AttentionCall) -> VarlenKernel | None:
    """The kernel, where it does segments in one call; dropout depends on their global positions."""
    kernel = call.kernel
    return kernel if isinstance(kernel, VarlenKernel) and kernel.varlen() and not call.spec.dropout_p else None


def _at_once(call: AttentionCall, q: Tensor, segments: Segments) -> VarlenKernel | None:
    """The kernel that takes these in one call.

    A single segment is a block, of which kernels take batch rows that do not lie one behind the other.
    """
    segments_of_a_row = len(segments.q_borders) - 1
    fits = segments_of_a_row > 1 and 0 < q.shape[0] * segments_of_a_row <= _MOST_SEGMENTS
    return _varlen(call) if fits and q.shape[2] else None


def _as_segments(call: AttentionCall, q_positions: range, k_positions: range) -> Segments | None:
    if q_positions != k_positions or _varlen(call) is None:
        return None
    return packed_segments(call.spec.mask, q_positions)


def _rows_forward(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, q_positions: range, k_positions: range
) -> tuple[Tensor, Tensor]:
    found = _rows_as_segments(call, q, q_positions, k_positions)
    if found is not None:
        alike, segments = found
        out, lse = segments_forward(alike, _one_row(q), _one_row(k), _one_row(v), segments)
        return _rows(out, q), lse[0].unflatten(1, (q.shape[0], -1)).transpose(0, 1)
    parts = [
        block_forward(part, q[rows], k[rows], v[rows], q_positions, k_positions)
        for part, rows in call.by_rows(q.shape[0])
    ]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


def _rows_backward(
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
    found = _rows_as_segments(call, q, q_positions, k_positions)
    if found is not None:
        alike, segments = found
        of_queries = _one_row(out), lse.transpose(0, 1).flatten(1)[None]
        inputs = _one_row(dout), _one_row(q), _one_row(k), _one_row(v)
        dq, dk, dv = segments_backward(alike, *inputs, *of_queries, segments)
        return _rows(dq, q), _rows(dk, k), _rows(dv, v)
    parts = []
    for part, rows in call.by_rows(q.shape[0]):
        tensors = dout[rows], q[rows], k[rows], v[rows], out[rows], lse[rows]
        parts.append(block_backward(part, *tensors, q_positions, k_positions))
    dq, dk, dv = (torch.cat(shares) for shares in zip(*parts, strict=True))
    return dq, dk, dv


def _rows_as_segments(
    call: AttentionCall, q: Tensor, q_positions: range, k_positions: range
) -> tuple[AttentionCall, Segments] | None:
    """The rows one behind the other, and the call without their borders."""
    rows = call.spec.cu_seqlens_by_row
    if q_positions != k_positions or _varlen(call) is None or not (rows and q.numel()):
        return None
    alike = replace(call, spec=replace(call.spec, cu_seqlens_by_row=None))
    return alike, packed_rows(call.spec.mask, rows, q_positions)


def _one_row(x: Tensor) -> Tensor:
    """``[B, n, ...]`` as ``[1, B n, ...]``."""
    return x.flatten(0, 1)[None]


def _rows(x: Tensor, like: Tensor) -> Tensor:
    return x[0].unflatten(0, like.shape[:2])


def _blocks(call: AttentionCall, q: Tensor, q_positions: range, k_positions: range) -> one_by_one.Work:
    found = blocks(call.spec.mask, q_positions, k_positions) if q.shape[0] and q.shape[2] else ()
    return [(block, call.of_block(block, q_positions, k_positions)) for block in found]


def _parts(call: AttentionCall, q: Tensor, segments: Segments) -> one_by_one.Work:
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

    q, k, v = map(autocast, (q, k, v))
    what = spec or AttentionSpec()
    for _, rows in what.by_rows(q.shape[0]):
        rows.mask.documents(max(q.shape[1], k.shape[1]))
    out, lse = attend(q, k, v, prepare(q, k, v, what))
    return (out, lse) if return_lse else out
