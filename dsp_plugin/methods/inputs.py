"""What every method asks of the tensors it is handed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.kernels.call import AttentionCall, prepare
from dsp_plugin.kernels.merge import accumulation_dtype
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout
from dsp_plugin.methods.method import Workload

SEQUENCE_DIM = 1

GradientDtype = Literal["fp32", "input"]


def gradient_dtype(setting: GradientDtype, dtype: torch.dtype) -> torch.dtype:
    """In which gradients of keys and values of ``dtype`` travel; ``fp32`` is fp64 for fp64 inputs."""
    return dtype if setting == "input" else accumulation_dtype(dtype)


def check_shards(q: Tensor, k: Tensor, v: Tensor, layout: Layout, axis: Axis) -> None:
    """Refuse q, k and v that are not the shards of this rank under ``layout``, alike on every rank.

    Raises:
        SequenceParallelConfigError: shapes or dtypes do not fit each other or the layout.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or not (
        q.shape[:2] == k.shape[:2] and k.shape[:3] == v.shape[:3] and q.shape[3] == k.shape[3]
    ):
        raise SequenceParallelConfigError(
            setting="attention inputs",
            value=shapes,
            why="expected q [B, n, H, D], k [B, n, K, D], v [B, n, K, Dv] with equal B, n and K",
            remedy="cross-attention to a replicated sequence needs no sequence parallelism: call it directly",
        )
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        raise SequenceParallelConfigError(
            setting="attention inputs",
            value=f"q {q.dtype}, k {k.dtype}, v {v.dtype}",
            why="q, k and v travel in one buffer and must share a dtype",
            remedy="cast them to the compute dtype first",
        )
    check_length(q, shapes, layout, axis)


def checked(q: Tensor, k: Tensor, v: Tensor, what: AttentionSpec, layout: Layout) -> AttentionCall:
    """The call of this attention, refused here, before anything is sent, where its kernel would refuse it.

    Raises:
        SequenceParallelConfigError: head counts or document borders do not fit.
        UnsupportedError: the kernel cannot serve such tensors.
    """
    what.mask.documents(layout.length)
    return prepare(q, k, v, what)


def check_length(x: Tensor, shapes: str, layout: Layout, axis: Axis) -> None:
    """Refuse tensors that do not hold as many tokens as ``layout`` gives this rank.

    Args:
        x: ``[B, n, ...]``.
        shapes: of it and what comes with it, for the error.

    Raises:
        SequenceParallelConfigError: n is another number.
    """
    assert layout.size == axis.size, (layout, axis)
    expected = layout.sizes[axis.rank]
    if x.shape[SEQUENCE_DIM] != expected:
        raise SequenceParallelConfigError(
            setting="sequence length",
            value=x.shape[SEQUENCE_DIM],
            why=f"of {layout.length} tokens in the {layout.kind} layout over {layout.size} ranks, rank {axis.rank} "
            f"holds {expected} of the {layout.length}, but its tensors are {shapes}",
            remedy="shard the batch with the same layout and length that the call is given",
        )


def illegal_heads(workload: Workload) -> list[str]:
    """Why no attention could serve these head counts; empty where one can."""
    heads, kv_heads = workload.heads, workload.kv_heads
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        return [f"heads={heads} is not a multiple of kv_heads={kv_heads}: fix the model's head counts."]
    return []
