"""Softmax methods called directly compute in autocast's dtype, as torch's own attention does, and send in it."""

from __future__ import annotations

import pytest
import torch

from dsp_plugin import (
    METHODS,
    AttentionSpec,
    Layout,
    MaskSpec,
    SequenceParallelConfig,
    SequenceParallelGroups,
    Where,
    ledger,
)
from dsp_plugin.kernels import dense_attention
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(90)]

SOFTMAX = [method.name for method in METHODS.values() if method.kind == "softmax"]


def worker(method: str) -> tuple[torch.dtype, torch.dtype, float, int, int]:
    """Dtypes of output and gradient, the output's error, bytes sent forward, and what they are for 16 bits."""
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method=method, size=2))
    layout = Layout(METHODS[method].layouts[0], 13, 2)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, 13, 4, 8, generator=generator) for _ in range(3)]
    # Rotary embeddings leave q and k in fp32 where v is in autocast's dtype.
    q, k, v = (layout.shard(x, 1, groups.sp.rank).clone().requires_grad_() for x in whole)
    attention, mask = METHODS[method].attention, MaskSpec(causal=True)
    assert attention is not None
    with ledger() as log, torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v.bfloat16(), what=AttentionSpec(mask), where=Where(groups, layout))
    sent = log.bytes(phase="forward")
    out.float().sum().backward()
    assert q.grad is not None
    expected, _ = dense_attention(*(x.double() for x in whole), mask=mask)
    error = (out.double() - layout.shard(expected, 1, groups.sp.rank)).abs().max().item()
    with ledger() as log:
        attention(*(x.detach().bfloat16() for x in (q, k, v)), what=AttentionSpec(mask), where=Where(groups, layout))
    return out.dtype, q.grad.dtype, error, sent, log.bytes(phase="forward")


@pytest.mark.parametrize("method", SOFTMAX)
def test_a_method_under_autocast_computes_and_sends_in_its_dtype(method: str) -> None:
    for out, gradient, error, sent, in_16_bits in spawn(worker, 2, method, timeout=60):
        assert (out, gradient) == (torch.bfloat16, torch.float32)
        assert error < 0.03
        assert sent == in_16_bits
