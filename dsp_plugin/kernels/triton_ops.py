"""Torch operators that launch our Triton kernels: one each for what the library asks of them in one call.

Operators, so that whoever counts, traces or compiles sees one opaque call whose results' shapes are known. They are
there without Triton too, which is imported when one of them runs on tensors that have data: on CUDA, or on the CPU in
Triton's interpreter (``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsp_plugin.kernels.dropout import Dropout
from dsp_plugin.kernels.kernel import BlockSpec
from dsp_plugin.mask import Band

FORWARD, BACKWARD = "dsp_plugin::triton_attention_forward", "dsp_plugin::triton_attention_backward"
_BLOCK = "int? left, int? right, float scale, float dropout_p, int seed, int[] q_run, int[] k_run, int[] offsets"
_DEVICES = ("cuda", "cpu")

torch.library.define(FORWARD, f"(Tensor q, Tensor k, Tensor v, {_BLOCK}) -> (Tensor, Tensor)")
torch.library.define(
    BACKWARD,
    f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_BLOCK}) -> (Tensor, Tensor, Tensor)",
)

Told = tuple[Any, ...]


def told(block: BlockSpec) -> Told:
    """A block as operators take it; `block_of` is the inverse."""
    drop = block.dropout
    if drop is None:
        return *block.band, block.scale, 0.0, 0, [0, 1], [0, 1], [0, 0]
    runs = ([run.start, run.step] for run in (drop.q_positions, drop.k_positions))
    return *block.band, block.scale, drop.p, drop.bits, *runs, [drop.head_offset, drop.batch_offset]


def block_of(q: Tensor, k: Tensor, block: Told) -> BlockSpec:
    """The block of q ``[B, n, H, D]`` and k ``[B, m, K, D]``."""
    left, right, scale, p, seed, *runs, offsets = block
    band: Band = (left, right)
    if not p:
        return BlockSpec(band, scale)
    (q_start, q_step), (k_start, k_step) = runs
    q_positions = range(q_start, q_start + q_step * q.shape[1], q_step)
    k_positions = range(k_start, k_start + k_step * k.shape[1], k_step)
    return BlockSpec(band, scale, Dropout(p, seed, q_positions, k_positions, *offsets))


@torch.library.register_fake(FORWARD)
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *block: Any) -> tuple[Tensor, Tensor]:
    batch, rows, heads, _ = q.shape
    return q.new_empty(batch, rows, heads, v.shape[-1]), q.new_empty(batch, heads, rows, dtype=torch.float32)


@torch.library.impl(FORWARD, _DEVICES)
def _forward(q: Tensor, k: Tensor, v: Tensor, *block: Any) -> tuple[Tensor, Tensor]:
    from dsp_plugin.kernels.triton_forward import forward

    return forward(_dense(q), _dense(k), _dense(v), block_of(q, k, block))


@torch.library.register_fake(BACKWARD)
def _fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *block: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


@torch.library.impl(BACKWARD, _DEVICES)
def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *block: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from dsp_plugin.kernels.triton_backward import backward

    told_of = block_of(q, k, block)
    return backward(_dense(dout.to(q.dtype)), _dense(q), _dense(k), _dense(v), _dense(out), lse, told_of)


def _dense(x: Tensor) -> Tensor:
    """Kernels read the last dim as dense."""
    return x if x.stride(-1) == 1 else x.contiguous()
