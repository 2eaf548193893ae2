"""Local softmax attention on the kernels of the table: whole sequences with autograd, and blocks for ring attention.

Shapes: q ``[B, n, H, D]``, k ``[B, m, K, D]``, v ``[B, m, K, Dv]``, out ``[B, n, H, Dv]``, lse ``[B, H, n]`` (fp32,
fp64 for fp64 inputs or the reference kernel; -inf with out 0 where a query sees no key).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dsp_plugin.derivatives import once_differentiable, refuse_transforms
from dsp_plugin.kernels.blocks import Block, blocks
from dsp_plugin.kernels.call import AttentionCall, prepare
from dsp_plugin.kernels.counter import record
from dsp_plugin.kernels.rows import row_by_row
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
    if not call.is_even and q.shape[2]:
        parts = [
            block_forward(even, q[:, :, heads], k[:, :, kv], v[:, :, kv], q_positions, k_positions)
            for even, heads, kv in call.evenly()
        ]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 1)

    def attend(block: Block) -> tuple[Tensor, Tensor]:
        record(call.kernel.name, "forward")
        spec = call.of_block(block, q_positions, k_positions)
        return call.kernel.forward(q[:, block.q], k[:, block.k], v[:, block.k], spec)

    found = _blocks(call, q, q_positions, k_positions)
    with torch.autocast(q.device.type, enabled=False):
        if _covers_all(found, q, k):
            return attend(found[0])
        out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=call.kernel.result_dtype(q.dtype), device=q.device)
        lse_shape = (q.shape[0], q.shape[2], q.shape[1])
        lse = torch.full(lse_shape, -torch.inf, dtype=call.kernel.lse_dtype(q.dtype), device=q.device)
        for block in found:
            out[:, block.q], lse[:, :, block.q] = attend(block)
    return out, lse


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
    if not call.is_even and q.shape[2]:
        dq, dk, dv = _zeros(call, q, k, v)
        for even, heads, kv in call.evenly():
            dq[:, :, heads], dk[:, :, kv], dv[:, :, kv] = block_backward(
                even,
                dout[:, :, heads],
                q[:, :, heads],
                k[:, :, kv],
                v[:, :, kv],
                out[:, :, heads],
                lse[:, heads],
                q_positions,
                k_positions,
            )
        return dq, dk, dv

    def differentiate(block: Block) -> tuple[Tensor, Tensor, Tensor]:
        record(call.kernel.name, "backward")
        return call.kernel.backward(
            dout[:, block.q],
            q[:, block.q],
            k[:, block.k],
            v[:, block.k],
            out[:, block.q],
            lse[:, :, block.q],
            call.of_block(block, q_positions, k_positions),
        )

    found = _blocks(call, q, q_positions, k_positions)
    with torch.autocast(q.device.type, enabled=False):
        if _covers_all(found, q, k):
            dq, dk, dv = differentiate(found[0])
        else:
            dq, dk, dv = _zeros(call, q, k, v)
            for block in found:
                dq[:, block.q], dk[:, block.k], dv[:, block.k] = differentiate(block)
    return dq, dk, dv


def _zeros(call: AttentionCall, *like: Tensor) -> list[Tensor]:
    return [torch.zeros(x.shape, dtype=call.kernel.result_dtype(x.dtype), device=x.device) for x in like]


def _blocks(call: AttentionCall, q: Tensor, q_positions: range, k_positions: range) -> tuple[Block, ...]:
    return blocks(call.spec.mask, q_positions, k_positions) if q.shape[0] and q.shape[2] else ()


def _covers_all(found: tuple[Block, ...], q: Tensor, k: Tensor) -> bool:
    return len(found) == 1 and (found[0].rows, found[0].cols) == (q.shape[1], k.shape[1])


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
