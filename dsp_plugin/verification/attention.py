"""Verification of methods that replace an attention call: one call, all of whose inputs want gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsp_plugin import kernels
from dsp_plugin.comm import ledger
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.methods import METHODS, Where
from dsp_plugin.verification.cases import Case
from dsp_plugin.verification.report import RankReport, WireCheck, judge

SEQUENCE_DIM = 1


def verify(case: Case, groups: SequenceParallelGroups, device: torch.device) -> RankReport:
    """Run the method on this rank's shard, and the oracle on the whole, which every rank can make from the seed."""
    method = METHODS[case.method]
    assert method.attention is not None
    layout, rank = case.workload().tokens(), groups.sp.rank
    q, k, v, dout = _inputs(case, device)
    what = case.attention()

    def shard(x: Tensor) -> Tensor:
        return layout.shard(x, SEQUENCE_DIM, rank)

    settings = {name: getattr(case, name) for name in method.settings}
    sharded = partial(method.attention, what=what, where=Where(groups, layout), **settings)
    with ledger() as log:
        got = _differentiate(sharded, *map(shard, (q, k, v, dout)))
    asked: dict[str, Any] = {"mask": case.mask, "dropout_p": case.dropout, "dropout_seed": case.seed}
    oracle = _differentiate(
        lambda *qkv: kernels.dense_attention(*qkv, **asked)[0], *(x.double() for x in (q, k, v, dout))
    )
    unsharded = _differentiate(partial(kernels.attention, spec=what), q, k, v, dout)
    distances = judge(got, oracle, unsharded, case.dtype, part=shard)
    formula = method.wire_bytes(case.workload(), rank)
    # Not by method name: nothing else may be sent either.
    forward, backward = log.bytes(phase="forward"), log.bytes(phase="backward")
    check = WireCheck("one attention call", rank, forward, formula.forward, backward, formula.backward)
    return RankReport(tuple(distances), (check,))


def _inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(case.seed)
    dims = [
        (case.heads, case.head_dim),
        (case.kv_heads, case.head_dim),
        (case.kv_heads, case.v_dim),
        (case.heads, case.v_dim),
    ]
    return tuple(
        torch.randn(case.batch, case.length, *dim, generator=generator, dtype=torch.float64).to(device, case.dtype)
        for dim in dims
    )


def _differentiate(attend: Callable[..., Tensor], *qkv_dout: Tensor) -> dict[str, Tensor]:
    *qkv, dout = qkv_dout
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attend(*leaves)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}
