"""The flash attention operators inside torch: one for CUDA, one for CPU. Both return and accept an lse."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from packaging.version import Version
from torch import Tensor

from dsp_plugin.kernels.blocks import Block, tiles, trim
from dsp_plugin.kernels.kernel import BlockSpec, Kernel, padded
from dsp_plugin.kernels.merge import accumulation_dtype, empty_state, merge_
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.kernels.windowed import Packing, Window, WindowedFlash
from dsp_plugin.mask import Band

_TORCH = Version(torch.__version__)
# Before, the lse of segments is padded to the longest, by the meta registrations of torch 2.6 and 2.7.
_VARLEN_MINIMUM = Version("2.7")


class CudaFlash(WindowedFlash):
    """``aten::_flash_attention_forward`` and its backward: FlashAttention-2 as compiled into torch."""

    name = "cuda_flash"

    def version(self) -> str | None:
        return torch.__version__

    def available(self) -> tuple[bool, str]:
        if torch.version.hip is not None:
            return False, "on ROCm torch's flash operator has another lse and window convention"
        if not torch.cuda.is_available():
            return False, "no cuda device"
        if not torch.backends.cuda.is_flash_attention_available():
            return False, "this torch was built without flash attention"
        return True, "built into torch"

    def varlen(self) -> bool:
        return _TORCH >= _VARLEN_MINIMUM

    def window_forward(
        self, q: Tensor, k: Tensor, v: Tensor, window: Window, block: BlockSpec, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = torch.ops.aten._flash_attention_forward.default(
            q,
            k,
            v,
            *_lengths(q, k, packing),
            0.0,
            window.causal,
            False,
            scale=block.scale,
            window_size_left=window.left,
            window_size_right=window.right,
        )
        return out, lse

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
        # Without dropout the generator state is not read, but the operator insists on tensors; filling them is two
        # launches.
        rng_state = torch.empty(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty((), dtype=torch.uint64, device=q.device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward.default(
            dout,
            q,
            k,
            v,
            out,
            lse,
            *_lengths(q, k, packing),
            0.0,
            window.causal,
            rng_state,
            unused,
            scale=block.scale,
            window_size_left=window.left,
            window_size_right=window.right,
        )
        return dq, dk, dv


def _lengths(q: Tensor, k: Tensor, packing: Packing | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    if packing is None:
        return None, None, q.shape[1], k.shape[1]
    return packing.cu_seqlens_q, packing.cu_seqlens_k, packing.max_seqlen_q, packing.max_seqlen_k


# A banded block is cut into strips of rows, and each strip's band is written out as a float bias; both are bounded.
_STRIP_ROWS = 256
_MIN_STRIP_ROWS = 64
_BIAS_ELEMENTS = 1 << 20


class CpuFlash(Kernel):
    """``aten::_scaled_dot_product_flash_attention_for_cpu`` and its backward.

    What was measured of the operator (torch 2.13), and what follows here:

    * It knows full, causal aligned at the first row, and a float bias: other bands are decomposed (`native_blocks`).
    * It wants equal head dims: the smaller are zero-padded. Head dims need not be round.
    * It reads the last dim as dense without checking it, and dies of a division by zero on empty tensors.
    * Rows that see no key get lse 0 instead of -inf: trimmed blocks have none.
    """

    name = "cpu_flash"

    def version(self) -> str | None:
        return torch.__version__

    def available(self) -> tuple[bool, str]:
        if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
            return False, "this torch has no flash attention operator for CPU"
        return True, "built into torch"

    def supports(
        self, dtype: torch.dtype, device: torch.device, head_dim: int, v_head_dim: int, spec: AttentionSpec
    ) -> str | None:
        if device.type != "cpu":
            return f"it runs on the cpu, the tensors are on {device.type}"
        if dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"it computes in float64, float32, bfloat16 or float16, the tensors are {dtype}"
        return "the operator refuses dropout" if spec.dropout_p else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> tuple[Tensor, Tensor]:
        assert block.dropout is None
        head_dim = max(q.shape[-1], v.shape[-1])
        q_, k_, v_ = (padded(x, head_dim).transpose(1, 2) for x in (q, k, v))

        def attend(part: Block, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
                q_[:, :, part.q],
                k_[:, :, part.k],
                v_[:, :, part.k],
                0.0,
                part.is_causal,
                attn_mask=bias,
                scale=block.scale,
            )
            return out.transpose(1, 2)[..., : v.shape[-1]], lse

        parts = _native_parts(q, k, block.band)
        if len(parts) == 1 and (parts[0].rows, parts[0].cols) == (q.shape[1], k.shape[1]):
            return attend(parts[0], _Biases(q)(parts[0]))
        out, lse = empty_state(q, v)
        biases = _Biases(q)
        for part in parts:
            merge_(out[:, part.q], lse[:, :, part.q], *attend(part, biases(part)))
        return out.to(q.dtype), lse

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
        widest = max(head_dim, v_head_dim)
        q_, k_, v_, dout_, out_ = (padded(x, widest).transpose(1, 2) for x in (q, k, v, dout, out))

        def differentiate(part: Block, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
                dout_[:, :, part.q],
                q_[:, :, part.q],
                k_[:, :, part.k],
                v_[:, :, part.k],
                out_[:, :, part.q],
                lse[:, :, part.q],
                0.0,
                part.is_causal,
                attn_mask=bias,
                scale=block.scale,
            )
            dq, dk, dv = (grad.transpose(1, 2) for grad in (dq, dk, dv))
            return dq[..., :head_dim], dk[..., :head_dim], dv[..., :v_head_dim]

        parts = _native_parts(q, k, block.band)
        biases = _Biases(q)
        if len(parts) == 1 and (parts[0].rows, parts[0].cols) == (q.shape[1], k.shape[1]):
            return differentiate(parts[0], biases(parts[0]))
        sums = [torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) for x in (q, k, v)]
        for part in parts:
            for total, share, run in zip(
                sums, differentiate(part, biases(part)), (part.q, part.k, part.k), strict=True
            ):
                total[:, run] += share
        return sums[0].to(q.dtype), sums[1].to(k.dtype), sums[2].to(v.dtype)


class _Biases:
    """The float bias of each part, kept while consecutive parts share it, as the strips inside a window do."""

    def __init__(self, q: Tensor) -> None:
        self.like = q
        self.key: tuple[object, ...] | None = None
        self.bias: Tensor | None = None

    def __call__(self, part: Block) -> Tensor | None:
        if part.is_full or part.is_causal:
            return None
        key = (part.rows, part.cols, part.band)
        if key != self.key:
            bias = torch.zeros(part.rows, part.cols, dtype=self.like.dtype, device=self.like.device)
            self.bias = bias.masked_fill_(~part.visible(self.like.device), -torch.inf)
            self.key = key
        return self.bias


def _native_parts(q: Tensor, k: Tensor, band: Band) -> list[Block]:
    block = trim(q.shape[1], k.shape[1], band)
    return [] if block is None else list(native_blocks(block))


def native_blocks(block: Block) -> Iterator[Block]:
    """Cuts a block into parts that are full, causal, or banded with at most `_BIAS_ELEMENTS` elements.

    The parts cover disjoint (query, key) pairs; those that share queries are to be merged.
    """
    if block.is_full or block.is_causal:
        yield block
    elif block.left is None:
        # j <= i + right: all rows see the first `right` keys, and counted from there the rest is causal.
        assert block.right is not None
        yield from _split_keys(block, block.right)
    else:
        width = block.cols if block.right is None else block.left + block.right + 1
        for strip in tiles(block, min(_STRIP_ROWS, max(_MIN_STRIP_ROWS, width)), block.cols):
            if strip.left is None:
                yield from native_blocks(strip)
            elif strip.rows * strip.cols <= _BIAS_ELEMENTS:
                yield strip
            else:
                # Only the keys before the last row's first one feel the left bound.
                yield from _split_keys(strip, strip.rows - 1 - strip.left)


def _split_keys(block: Block, first: int) -> Iterator[Block]:
    border = block.k.start + first
    for keys in (slice(block.k.start, border), slice(border, block.k.stop)):
        part = block.restrict(block.q, keys)
        if part is not None:
            yield from native_blocks(part)
