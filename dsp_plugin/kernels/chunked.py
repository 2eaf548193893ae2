"""The `math` kernel: plain torch operations over tiles of bounded size, on any device, dtype and head dim.

It has dropout where `triton` does not run: the flash kernels draw theirs from a generator whose stream depends on how
the work is sharded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsp_plugin.kernels.blocks import Block, tiles, trim
from dsp_plugin.kernels.dropout import Dropout
from dsp_plugin.kernels.kernel import BlockSpec, Kernel
from dsp_plugin.kernels.merge import accumulation_dtype, empty_state, merge_
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.mask import Band

# Scores per tile over all batch rows and heads, a few such buffers at a time: they should stay in a CPU's cache (4 MiB
# in fp32), and keep a GPU busy (64 MiB).
_CPU_TILE_ELEMENTS = 1 << 20
_TILE_ELEMENTS = 1 << 24
_TILE_COLS = 2048


class Math(Kernel):
    """Tiled attention with fp32 accumulation (fp64 for fp64 inputs)."""

    name = "math"
    dropout_cost = "fp32, some 250 launches a tile"

    def __init__(self, tile_elements: int | None = None, tile_cols: int = _TILE_COLS) -> None:
        self.tile_elements, self.tile_cols = tile_elements, tile_cols

    def available(self) -> tuple[bool, str]:
        return True, "plain torch, tiled; any device, dtype and head dim; the kernel for dropout where triton is not"

    def version(self) -> str | None:
        return torch.__version__

    def supports(
        self, dtype: torch.dtype, device: torch.device, head_dim: int, v_head_dim: int, spec: AttentionSpec
    ) -> str | None:
        return None if dtype.is_floating_point else f"attention needs a floating point dtype, got {dtype}"

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return accumulation_dtype(dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, block: BlockSpec) -> tuple[Tensor, Tensor]:
        out, lse = empty_state(q, v)
        heads, kv_heads = q.shape[2], k.shape[2]
        for tile in self._tiles(q, k, block.band):
            scores = _tile_scores(q, k, tile, block)
            tile_lse = scores.logsumexp(-1)
            probabilities = scores.sub_(tile_lse[..., None]).exp_()
            if block.dropout is not None:
                probabilities *= _keep_factor(block.dropout, tile, q, kv_heads)
            tile_out = probabilities @ _by_kv_head(v[:, tile.k])
            merge_(
                out[:, tile.q],
                lse[:, :, tile.q],
                _by_position(tile_out, heads),
                tile_lse.reshape(q.shape[0], heads, tile.rows),
            )
        return out, lse

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
        dtype = accumulation_dtype(q.dtype)
        batch, heads, kv_heads = q.shape[0], q.shape[2], k.shape[2]
        dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
        # Rows of the softmax Jacobian need sum_j p_ij dp_ij, which equals dout . out, with dropout too.
        delta = (dout.to(dtype) * out.to(dtype)).sum(-1).transpose(1, 2)
        for tile in self._tiles(q, k, block.band):

            def rows(x: Tensor, tile: Block = tile) -> Tensor:
                return x[:, :, tile.q].to(dtype).reshape(batch, kv_heads, -1, 1)

            dout_tile = _by_kv_head(dout[:, tile.q], kv_heads)
            probabilities = _tile_scores(q, k, tile, block).sub_(rows(lse)).exp_()
            dprobabilities = dout_tile @ _by_kv_head(v[:, tile.k]).mT
            dropped = probabilities
            if block.dropout is not None:
                factor = _keep_factor(block.dropout, tile, q, kv_heads)
                dropped = probabilities * factor
                dprobabilities *= factor
            dv[:, tile.k] += (dropped.mT @ dout_tile).transpose(1, 2)
            dscores = dprobabilities.sub_(rows(delta)).mul_(probabilities).mul_(block.scale)
            dq[:, tile.q] += _by_position(dscores @ _by_kv_head(k[:, tile.k]), heads)
            dk[:, tile.k] += (dscores.mT @ _by_kv_head(q[:, tile.q], kv_heads)).transpose(1, 2)
        return dq, dk, dv

    def _tiles(self, q: Tensor, k: Tensor, band: Band) -> list[Block]:
        block = trim(q.shape[1], k.shape[1], band)
        if block is None:
            return []
        cols = min(self.tile_cols, block.cols)
        elements = self.tile_elements or (_CPU_TILE_ELEMENTS if q.device.type == "cpu" else _TILE_ELEMENTS)
        rows = max(1, elements // (q.shape[0] * q.shape[2] * cols))
        return list(tiles(block, min(rows, block.rows), cols))


def _by_kv_head(x: Tensor, kv_heads: int | None = None) -> Tensor:
    """``[B, n, H, D]`` to ``[B, K, (H/K) n, D]`` in the accumulation dtype, so that one matmul serves a kv head."""
    batch, n, heads, dim = x.shape
    kv_heads = heads if kv_heads is None else kv_heads
    x = x.to(accumulation_dtype(x.dtype)).transpose(1, 2)
    return x.reshape(batch, kv_heads, heads // kv_heads * n, dim)


def _by_position(x: Tensor, heads: int) -> Tensor:
    """The inverse of `_by_kv_head`: ``[B, K, (H/K) n, D]`` to ``[B, n, H, D]``."""
    batch, _, _, dim = x.shape
    return x.reshape(batch, heads, -1, dim).transpose(1, 2)


def _tile_scores(q: Tensor, k: Tensor, tile: Block, block: BlockSpec) -> Tensor:
    """Masked, scaled scores ``[B, K, (H/K) rows, cols]``."""
    scores = (_by_kv_head(q[:, tile.q], k.shape[2]) * block.scale) @ _by_kv_head(k[:, tile.k]).mT
    if not tile.is_full:
        hidden = ~tile.visible(q.device)
        scores.unflatten(2, (-1, tile.rows)).masked_fill_(hidden, -torch.inf)
    return scores


def _keep_factor(dropout: Dropout, tile: Block, q: Tensor, kv_heads: int) -> Tensor:
    """``1 / (1 - p)`` where kept, 0 where dropped, in the layout of `_tile_scores`."""
    keep = dropout.narrow(tile.q, tile.k).keep(q.shape[0], q.shape[2], q.device)
    return keep.reshape(q.shape[0], kv_heads, -1, tile.cols).to(accumulation_dtype(q.dtype)) * dropout.scale
