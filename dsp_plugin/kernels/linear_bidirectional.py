"""Linear attention without a mask: every token reads the sum over all tokens of its document.

    o_t = scale * q_t S        S = sum of k_s^T v_s over the document of t

Of the documents that a rank holds a part of, those that go on at another rank are summed over the ranks, in one
all-reduce forward (of S) and one backward (of its gradient).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.derivatives import once_differentiable
from dsp_plugin.kernels import counter
from dsp_plugin.kernels.merge import accumulation_dtype

# From the sums of this rank's parts of documents [documents, B, H, K, V] to the sums of whole documents.
Reduce = Callable[[Tensor, str], Tensor]


def bidirectional(
    q: Tensor, k: Tensor, v: Tensor, scale: float, borders: tuple[int, ...], reduce: Reduce = lambda sums, phase: sums
) -> Tensor:
    """Attention of every token to all of its document.

    Args:
        q: ``[B, n, Hk, K]``.
        k: ``[B, n, Hk, K]``.
        v: ``[B, n, H, V]``.
        borders: local offsets ``(0, ..., n)`` between the parts of documents that this rank holds.
        reduce: adds what other ranks hold of the same documents; its second argument is ``forward`` or ``backward``.

    Returns:
        ``[B, n, H, V]``.
    """
    # Sums are fp32 whatever the layers around them compute in.
    with torch.autocast(q.device.type, enabled=False):
        out: Tensor = _Bidirectional.apply(q, k, v, scale, borders, reduce)
    return out


class _Bidirectional(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, borders: tuple[int, ...], reduce: Reduce
    ) -> Tensor:
        counter.record("chunked", "forward")
        sums = reduce(_outer(_shared(k, v), v, borders), "forward")
        ctx.save_for_backward(q, k, v, sums)
        ctx.args = scale, borders, reduce
        return (_times(_shared(q, v), sums, borders) * scale).to(v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, sums = ctx.saved_tensors
        scale, borders, reduce = ctx.args
        counter.record("chunked", "backward")
        with torch.autocast(q.device.type, enabled=False):
            dsums = reduce(_outer(_shared(q, v), dout, borders), "backward") * scale
            dq = _own(_times(dout, sums.mT, borders), q) * scale
            dk, dv = _own(_times(v, dsums.mT, borders), k), _times(_shared(k, v), dsums, borders)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _shared(x: Tensor, v: Tensor) -> Tensor:
    """Queries or keys ``[B, n, Hk, K]`` for every head of ``v``."""
    return x.repeat_interleave(v.shape[2] // x.shape[2], 2)


def _own(grad: Tensor, x: Tensor) -> Tensor:
    """Gradients of queries or keys, added up over the heads that share one."""
    return grad.unflatten(2, (x.shape[2], -1)).sum(3)


def _outer(left: Tensor, right: Tensor, borders: tuple[int, ...]) -> Tensor:
    """``sum_t left_t^T right_t`` over each part: ``[parts, B, H, K, V]``."""
    left, right = (x.transpose(1, 2).to(accumulation_dtype(x.dtype)) for x in (left, right))
    return torch.stack([left[:, :, a:b].mT @ right[:, :, a:b] for a, b in pairwise(borders)])


def _times(x: Tensor, sums: Tensor, borders: tuple[int, ...]) -> Tensor:
    """Every token of ``x`` ``[B, n, H, K]`` times the sum of its part: ``[B, n, H, V]``."""
    x = x.transpose(1, 2).to(sums.dtype)
    parts = [x[:, :, a:b] @ part for (a, b), part in zip(pairwise(borders), sums, strict=True)]
    return torch.cat(parts, 2).transpose(1, 2)
