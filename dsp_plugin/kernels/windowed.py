"""Blocks for the CUDA flash kernels, which all express a band as a causal flag and a window.

Their window is aligned at the *last* query and key: query i of n sees keys ``i + m - n - left .. i + m - n + right``,
-1 standing for unbounded. A trimmed block translates into non-negative windows. One trap: FlashAttention-2 replaces a
bound of at least m by -1, which is only harmless while ``n <= m``; a banded block with more queries than keys is
therefore cut into row ranges in each of which it is either unbounded or has ``n <= m``. With segments m is that of
the longest, and a bound that large hides nothing of the others either, as each has ``n <= m``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dsp_plugin.kernels.blocks import Block, trim
from dsp_plugin.kernels.kernel import BlockSpec, VarlenKernel, padded
from dsp_plugin.kernels.merge import accumulation_dtype
from dsp_plugin.kernels.segments import Segments
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.mask import Band

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Window:
    """A band in FlashAttention's convention; -1 is unbounded."""

    left: int
    right: int

    @property
    def causal(self) -> bool:
        return self.left == -1 and self.right == 0


def window_of(block: Block) -> Window:
    """The window of a trimmed block with no more queries than keys, or with no band at all."""
    assert block.is_full or block.rows <= block.cols
    excess = block.cols - block.rows
    left = -1 if block.left is None else block.left + excess
    right = -1 if block.right is None else block.right - excess
    return Window(left, right)


def expressible(block: Block) -> list[Block]:
    """The block, cut by rows until `window_of` can express every piece; key ranges may overlap."""
    if block.is_full or block.rows <= block.cols:
        return [block]
    # Below the first cut `right` bounds a row, from the second on `left` does.
    cuts = {0, block.rows}
    if block.right is not None:
        cuts.add(block.cols - 1 - block.right)
    if block.left is not None:
        cuts.add(block.left + 1)
    borders = [block.q.start + cut for cut in sorted(cuts)]
    pieces = [block.restrict(slice(a, b), block.k) for a, b in pairwise(borders)]
    return [piece for piece in pieces if piece is not None]


@dataclass(frozen=True)
class Packing:
    """Where segments lie in the tokens ``[B n]`` of a whole batch; both borders int32 ``[B S + 1]`` on the device."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class WindowedFlash(VarlenKernel):
    """A flash kernel on CUDA: fp16 and bf16, head dims up to 256, no dropout (its generator depends on sharding)."""

    min_capability = (8, 0)

    def supports(
        self, dtype: torch.dtype, device: torch.device, head_dim: int, v_head_dim: int, spec: AttentionSpec
    ) -> str | None:
        if device.type != "cuda":
            return f"it runs on cuda devices, the tensors are on {device.type}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in float16 or bfloat16, the tensors are {dtype}"
        if max(head_dim, v_head_dim) > MAX_HEAD_DIM:
            return f"head dim {max(head_dim, v_head_dim)} exceeds {MAX_HEAD_DIM}"
        if spec.dropout_p:
            return "its dropout would depend on how the sequence is sharded"
        return self.refuses_capability(torch.cuda.get_device_capability(device), max(head_dim, v_head_dim))

    def refuses_capability(self, capability: tuple[int, int], head_dim: int) -> str | None:
        """Why a GPU of this compute capability cannot run the kernel, or None."""
        if capability < self.min_capability:
            return f"it needs compute capability {self.min_capability}, the device has {capability}"
        if head_dim > 192 and capability in ((8, 6), (8, 9), (12, 0)):
            return f"its backward at head dim {head_dim} does not fit the shared memory of capability {capability}"
        return None

    @abstractmethod
    def window_forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: Window, block: BlockSpec, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` for equal head dims that are a multiple of 8.

        Args:
            packing: with it the tensors are ``[B n, heads, D]``, the window is that of each segment, and lse is
                ``[H, B n]``.
        """

    @abstractmethod
    def window_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        window: Window,
        block: BlockSpec,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)``; lse is contiguous fp32 ``[B, H, n]``, with a packing ``[H, B n]``."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> tuple[Tensor, Tensor]:
        assert block.dropout is None
        v_head_dim, (q, k, v) = v.shape[-1], _equal_head_dims(q, k, v)
        pieces = _pieces(q, k, block.band)
        results = []
        for piece in pieces:
            out, lse = self.window_forward(q[:, piece.q], k[:, piece.k], v[:, piece.k], window_of(piece), block)
            results.append((out[..., :v_head_dim], lse[..., : piece.rows]))
        if len(results) == 1:
            return results[0]
        return torch.cat([out for out, _ in results], 1), torch.cat([lse for _, lse in results], 2)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        block: BlockSpec,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert block.dropout is None
        head_dim, v_head_dim = q.shape[-1], v.shape[-1]
        q, k, v, dout, out = _equal_head_dims(q, k, v, dout, out)
        pieces = _pieces(q, k, block.band)
        results = [
            self.window_backward(
                dout[:, piece.q],
                q[:, piece.q],
                k[:, piece.k],
                v[:, piece.k],
                out[:, piece.q],
                lse[:, :, piece.q].contiguous(),
                window_of(piece),
                block,
            )
            for piece in pieces
        ]
        dq = results[0][0] if len(results) == 1 else torch.cat([result[0] for result in results], 1)
        dk, dv = results[0][1:]
        if len(results) > 1:
            sums = [torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) for x in (k, v)]
            for piece, (_, piece_dk, piece_dv) in zip(pieces, results, strict=True):
                sums[0][:, piece.k] += piece_dk
                sums[1][:, piece.k] += piece_dv
            dk, dv = sums[0].to(k.dtype), sums[1].to(v.dtype)
        return dq[..., :head_dim], dk[..., :head_dim], dv[..., :v_head_dim]

    def varlen_forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        batch, v_head_dim = q.shape[0], v.shape[-1]
        window, packing = _packing(q, segments)
        q, k, v = _one_behind_the_other(*_equal_head_dims(q, k, v))
        out, lse = self.window_forward(q, k, v, window, BlockSpec(_NO_BAND, scale), packing)
        return out[..., :v_head_dim].unflatten(0, (batch, -1)), lse.unflatten(1, (batch, -1)).transpose(0, 1)

    def varlen_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        segments: Segments,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, head_dim, v_head_dim = q.shape[0], q.shape[-1], v.shape[-1]
        window, packing = _packing(q, segments)
        dout, q, k, v, out = _one_behind_the_other(*_equal_head_dims(dout, q, k, v, out))
        lse = lse.transpose(0, 1).flatten(1).contiguous()
        gradients = self.window_backward(dout, q, k, v, out, lse, window, BlockSpec(_NO_BAND, scale), packing)
        dq, dk, dv = (x.unflatten(0, (batch, -1)) for x in gradients)
        return dq[..., :head_dim], dk[..., :head_dim], dv[..., :v_head_dim]


_NO_BAND: Band = (None, None)


def _packing(q: Tensor, segments: Segments) -> tuple[Window, Packing]:
    window = Window(*(-1 if side is None else side for side in (segments.left, segments.right)))
    return window, Packing(*segments.cu_seqlens(q.device, q.shape[0]), *segments.most)


def _one_behind_the_other(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``[B, n, ...]`` as ``[B n, ...]``, a view where strides allow."""
    return tuple(x.flatten(0, 1) for x in tensors)


def _equal_head_dims(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All tensors padded to one head dim, a multiple of 8."""
    head_dim = -(-max(x.shape[-1] for x in tensors) // 8) * 8
    return tuple(padded(x, head_dim) for x in tensors)


def _pieces(q: Tensor, k: Tensor, band: Band) -> list[Block]:
    block = trim(q.shape[1], k.shape[1], band)
    assert block is not None
    assert (block.rows, block.cols) == (q.shape[1], k.shape[1]), "blocks arrive trimmed"
    return expressible(block)
