"""Local softmax attention on the kernels of the table: whole sequences with autograd, and blocks for ring attention.

Shapes: q ``[B, n, H, D]``, k ``[B, m, K, D]``, v ``[B, m, K, Dv]``, out ``[B, n, H, Dv]``, lse ``[B, H, n]`` (fp32,
fp64 for fp64 inputs or the reference kernel; -inf with out 0 where a query sees no key).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.kernels.blocks import Block, blocks
from dsp_plugin.kernels.counter import record
from dsp_plugin.kernels.dropout import Dropout
from dsp_plugin.kernels.kernel import Kernel
from dsp_plugin.kernels.table import choose
from dsp_plugin.mask import MaskSpec


@dataclass(frozen=True)
class AttentionCall:
    """Everything about an attention but its tensors and their positions; made by `prepare`.

    Args:
        kernel: the chosen kernel.
        mask: the mask, in global positions.
        scale: factor on the scores.
        q_per_kv: how many consecutive query heads each kv head serves, None when ``H / K`` each.
        dropout_p, dropout_seed: see `dsp_plugin.kernels.dropout`.
        head_offset, batch_offset: global indices of the first local query head and batch row; only dropout sees them.
    """

    kernel: Kernel
    mask: MaskSpec
    scale: float
    q_per_kv: tuple[int, ...] | None = None
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    head_offset: int = 0
    batch_offset: int = 0

    def dropout(self, q_positions: range, k_positions: range) -> Dropout | None:
        """The dropout of a block at these global positions; None without dropout."""
        if self.dropout_p == 0.0 or self.dropout_seed is None:
            return None
        return Dropout(self.dropout_p, self.dropout_seed, q_positions, k_positions, self.head_offset, self.batch_offset)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: MaskSpec,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    head_offset: int = 0,
    batch_offset: int = 0,
    q_per_kv: tuple[int, ...] | None = None,
    kernel: str = "auto",
) -> AttentionCall:
    """Checks the settings against the tensors and chooses a kernel. Arguments as for `attention`.

    Raises:
        SequenceParallelConfigError: heads, dtypes, dropout settings or the kernel's name are illegal.
        UnsupportedError: the forced kernel cannot serve such tensors.
    """
    assert q.dim() == k.dim() == v.dim() == 4
    assert q.shape[0] == k.shape[0]
    assert q.shape[3] == k.shape[3]
    assert k.shape[:3] == v.shape[:3]
    if not q.dtype == k.dtype == v.dtype:
        raise UnsupportedError(
            setting="attention dtypes",
            value=f"q {q.dtype}, k {k.dtype}, v {v.dtype}",
            why="one kernel call reads all three in one dtype",
            remedy="cast them alike; rotary embeddings computed in fp32 are the usual cause",
        )
    if not 0.0 <= dropout_p < 1.0:
        raise SequenceParallelConfigError(
            setting="dropout_p", value=dropout_p, why="a dropout probability lies in [0, 1)", remedy="correct it"
        )
    if dropout_p > 0.0 and dropout_seed is None:
        raise SequenceParallelConfigError(
            setting="dropout_seed",
            why=f"it is None with dropout_p={dropout_p}; ranks could not agree on what to drop",
            remedy="pass an integer, the same on every rank of the sequence group and new for every layer and step",
        )
    heads, kv_heads = q.shape[2], k.shape[2]
    if q_per_kv is None:
        if heads != 0 and (kv_heads == 0 or heads % kv_heads):
            raise SequenceParallelConfigError(
                setting="heads",
                value=f"{heads} query heads and {kv_heads} kv heads",
                why=f"{heads} is not a multiple of {kv_heads}, so the heads cannot be shared evenly",
                remedy="pass q_per_kv, the number of query heads that each kv head serves",
            )
    elif len(q_per_kv) != kv_heads or sum(q_per_kv) != heads or min(q_per_kv, default=0) < 0:
        raise SequenceParallelConfigError(
            setting="q_per_kv",
            value=q_per_kv,
            why=f"it must have one count for each of {kv_heads} kv heads, adding up to {heads} query heads; "
            f"it has {len(q_per_kv)} adding up to {sum(q_per_kv)}",
            remedy="count the local query heads of each local kv head",
        )
    return AttentionCall(
        kernel=choose(kernel, q.device, q.dtype, q.shape[-1], v.shape[-1], dropout_p),
        mask=mask,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        # Even groups are what the kernels do natively.
        q_per_kv=q_per_kv if q_per_kv is not None and (len(set(q_per_kv)) > 1 or 0 in q_per_kv) else None,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        head_offset=head_offset,
        batch_offset=batch_offset,
    )


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
    if call.q_per_kv is not None and q.shape[2]:
        parts = [
            block_forward(even, q[:, :, heads], k[:, :, kv], v[:, :, kv], q_positions, k_positions)
            for even, heads, kv in _even_calls(call)
        ]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 1)
    dropout = call.dropout(q_positions, k_positions)

    def attend(block: Block) -> tuple[Tensor, Tensor]:
        record(call.kernel.name, "forward")
        return call.kernel.forward(
            q[:, block.q],
            k[:, block.k],
            v[:, block.k],
            block.band,
            scale=call.scale,
            dropout=None if dropout is None else dropout.narrow(block.q, block.k),
        )

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
    if call.q_per_kv is not None and q.shape[2]:
        dq, dk, dv = _zeros(call, q, k, v)
        for even, heads, kv in _even_calls(call):
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
    dropout = call.dropout(q_positions, k_positions)

    def differentiate(block: Block) -> tuple[Tensor, Tensor, Tensor]:
        record(call.kernel.name, "backward")
        return call.kernel.backward(
            dout[:, block.q],
            q[:, block.q],
            k[:, block.k],
            v[:, block.k],
            out[:, block.q],
            lse[:, :, block.q],
            block.band,
            scale=call.scale,
            dropout=None if dropout is None else dropout.narrow(block.q, block.k),
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
    return blocks(call.mask, q_positions, k_positions) if q.shape[0] and q.shape[2] else ()


def _covers_all(found: tuple[Block, ...], q: Tensor, k: Tensor) -> bool:
    return len(found) == 1 and (found[0].rows, found[0].cols) == (q.shape[1], k.shape[1])


def _even_calls(call: AttentionCall) -> Iterator[tuple[AttentionCall, slice, slice]]:
    """The call cut into ones whose kv heads serve equally many query heads, with the query and kv heads of each.

    Kernels share heads evenly. Repeating kv heads instead costs memory, and a rounding of dk and dv per query head.
    """
    assert call.q_per_kv is not None
    first_q = first_kv = 0
    for served, run in groupby(call.q_per_kv):
        kv = slice(first_kv, first_kv + len(list(run)))
        heads = slice(first_q, first_q + served * (kv.stop - kv.start))
        if served:
            yield replace(call, q_per_kv=None, head_offset=call.head_offset + first_q), heads, kv
        first_q, first_kv = heads.stop, kv.stop


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


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: MaskSpec,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    head_offset: int = 0,
    batch_offset: int = 0,
    q_per_kv: tuple[int, ...] | None = None,
    kernel: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: MaskSpec,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    head_offset: int = 0,
    batch_offset: int = 0,
    q_per_kv: tuple[int, ...] | None = None,
    kernel: str = "auto",
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: MaskSpec,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | None = None,
    head_offset: int = 0,
    batch_offset: int = 0,
    q_per_kv: tuple[int, ...] | None = None,
    kernel: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over whole sequences that this rank holds, differentiable in q, k and v.

    Args:
        q: ``[B, Lq, H, D]``; k: ``[B, Lk, K, D]``; v: ``[B, Lk, K, Dv]``, one dtype. Under autocast they are cast to
            its dtype first. Positions start at 0 on both sides, also when Lq and Lk differ: causal then is ``j <= i``.
        mask: which keys a query sees; a packed mask's borders end at ``max(Lq, Lk)``.
        scale: factor on the scores, ``D ** -0.5`` if None.
        dropout_p: probability of dropping an attention probability.
        dropout_seed: required with dropout; equal on all ranks of a sequence group, new for each layer and step.
        head_offset: global index of the first query head, when this rank holds a range of the heads.
        batch_offset: global index of the first batch row, when the batch is sharded too.
        q_per_kv: how many consecutive query heads each kv head serves; uneven counts are allowed. ``H / K`` if None.
        kernel: a name in `dsp_plugin.kernels.table.KERNELS`, or ``"auto"``.
        return_lse: also return lse ``[B, H, Lq]``, which is not differentiable.

    Returns:
        out ``[B, Lq, H, Dv]`` in the dtype of q; 0, with gradient 0, where a query sees no key.

    Raises:
        SequenceParallelConfigError: heads, dropout settings, document borders or the kernel's name are illegal.
        UnsupportedError: mixed dtypes, or the forced kernel cannot serve such tensors.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    call = prepare(
        q,
        k,
        v,
        mask=mask,
        scale=scale,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        head_offset=head_offset,
        batch_offset=batch_offset,
        q_per_kv=q_per_kv,
        kernel=kernel,
    )
    mask.documents(max(q.shape[1], k.shape[1]))
    out, lse = _Attention.apply(q, k, v, call)
    return (out, lse) if return_lse else out
