"""Verification of DSP: every switch of a tensor, and a stack of stages under the gradient contract.

The stack is what a multi-dimensional transformer is made of: attention along one token dim at a time, with a condition
that every rank holds whole, rows that run along time and are cut with it, and parameters before, inside and after the
sharded region. It goes through `parallelize`, as a user's model does.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, permutations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_plugin import kernels
from dsp_plugin.comm import ledger
from dsp_plugin.comm.axis import Axis
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import Layout
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import METHODS, WireBytes, dsp
from dsp_plugin.planner.stages import StagePlan
from dsp_plugin.plans.plan import Plan
from dsp_plugin.plans.stage import Stage
from dsp_plugin.sharding.parallelize import parallelize
from dsp_plugin.verification.cases import Case
from dsp_plugin.verification.report import Distance, RankReport, WireCheck, exact, judge

Attend = Callable[..., Tensor]
# Inputs by name; the rest are parameters.
_X, _CONDITION, _ROWS = "x", "condition", "rows"


def verify(case: Case, groups: SequenceParallelGroups, device: torch.device) -> RankReport:
    """Run stages and switches on this rank, and the oracle on the whole, which every rank can make from the seed."""
    assert case.grid is not None, "a switch case needs a grid"
    distances, wire = _stages(case, groups, device)
    token_dims = range(1, len(case.grid) + 1)
    for pair in [*permutations(token_dims, 2), (0, 1), (1, 0)]:
        more_distances, check = _switch(case, groups, device, *pair)
        distances, wire = [*distances, *more_distances], [*wire, check]
    return RankReport(tuple(distances), tuple(wire))


def _token_dims(case: Case) -> list[str]:
    assert case.grid is not None
    return {2: ["t", "s"], 3: ["t", "h", "w"]}.get(len(case.grid)) or [f"d{dim}" for dim in range(len(case.grid))]


def _switch(
    case: Case, groups: SequenceParallelGroups, device: torch.device, from_dim: int, to_dim: int
) -> tuple[list[Distance], WireCheck]:
    """One switch there; the gradient comes back. Data only moves, so both must be equal to the bit."""
    axis, shape = groups.dsp, _shape(case)
    generator = torch.Generator().manual_seed(case.seed)
    x, grad = (torch.randn(shape, generator=generator).to(device, case.dtype) for _ in range(2))
    before, after = (Layout("contiguous", shape[dim], axis.size) for dim in (from_dim, to_dim))
    local = before.shard(x, from_dim, axis.rank).clone().requires_grad_()
    with ledger() as log:
        out = dsp.switch(local, from_dim, to_dim, length=shape[from_dim], groups=groups)
        (got,) = torch.autograd.grad(out, local, after.shard(grad, to_dim, axis.rank))
    names = ["b", *_token_dims(case)]
    name = f"switch {names[from_dim]} -> {names[to_dim]}"
    distances = [
        exact(name, out, after.shard(x, to_dim, axis.rank)),
        exact(f"gradient of {name}", got, before.shard(grad, from_dim, axis.rank)),
    ]
    formula = dsp.switch_bytes(
        shape, from_dim, to_dim, size=axis.size, rank=axis.rank, element_size=case.dtype.itemsize
    )
    return distances, _check(name, axis.rank, log.bytes(phase="forward"), log.bytes(phase="backward"), formula)


def _stages(case: Case, groups: SequenceParallelGroups, device: torch.device) -> tuple[list[Distance], list[WireCheck]]:
    """The stack of stages, sharded, against the same stack in fp64 in one process."""

    def flash(q: Tensor, k: Tensor, v: Tensor, *, mask: MaskSpec) -> Tensor:
        return kernels.attention(q, k, v, kernels.AttentionSpec(mask, kernel=case.kernel))

    model = _AxialStack(case, flash).to(device, case.dtype)
    oracle_model = _AxialStack(case, lambda q, k, v, *, mask: kernels.dense_attention(q, k, v, mask=mask)[0])
    oracle_model.load_state_dict(model.state_dict())
    inputs, dout = _inputs(case, device)
    oracle = _run(oracle_model.to(device).double(), {name: x.double() for name, x in inputs.items()}, dout.double())
    unsharded = _run(model, inputs, dout)

    config = SequenceParallelConfig(method=case.method, size=case.size)
    handle = parallelize(model, _plan(case), config=config, groups=groups)
    with ledger() as log:
        got = _run(model, inputs, dout)
    plan = handle.stage_plan
    assert plan is not None
    handle.remove()

    axis = groups.sp
    # The tokens' own gradient is whole and exact on every rank; all else is what a framework averages.
    averaged = {name: x for name, x in got.items() if name not in ("out", f"d {_X}")}
    got |= _means(averaged, axis)
    distances = judge(got, oracle, unsharded, case.dtype)
    formula = _formula(case, plan, axis.rank)
    moved = {phase: log.bytes(collective="all_to_all", phase=phase) for phase in ("forward", "backward")}
    checks = [_check("the switches", axis.rank, moved["forward"], moved["backward"], formula)]
    shares = _shares(case, plan, axis)
    rest = {phase: log.bytes(phase=phase) - moved[phase] for phase in ("forward", "backward")}
    checks.append(_check("split and gather", axis.rank, rest["forward"], rest["backward"], shares))
    return distances, checks


def _check(what: str, rank: int, forward: int, backward: int, formula: WireBytes) -> WireCheck:
    return WireCheck(what, rank, forward, formula.forward, backward, formula.backward)


def _formula(case: Case, plan: StagePlan, rank: int) -> WireBytes:
    """What the method declares for space, time and back; on other grids the switches of the plan, one by one."""
    assert case.grid is not None
    if len(case.grid) == 2:
        return METHODS[case.method].wire_bytes(case.workload(), rank)
    names, shape = ["b", *_token_dims(case)], _shape(case)
    dims = [names.index(row.sharded) for row in plan.rows]
    moves = [
        dsp.switch_bytes(shape, a, b, size=case.size, rank=rank, element_size=case.dtype.itemsize)
        for a, b in pairwise(dims)
        if a != b
    ]
    return WireBytes(sum(move.forward for move in moves), sum(move.backward for move in moves))


def _shares(case: Case, plan: StagePlan, axis: Axis) -> WireBytes:
    """`gather` sends the output's shard forward, `split` the gradient's backward, to every other rank."""
    names, shape = ["b", *_token_dims(case)], _shape(case)
    sent = []
    for row in (plan.rows[-1], plan.rows[0]):
        dim = names.index(row.sharded)
        local = Layout("contiguous", shape[dim], axis.size).shard(torch.empty(shape, device="meta"), dim, axis.rank)
        sent.append((axis.size - 1) * local.numel() * case.dtype.itemsize)
    return WireBytes(*sent)


def _shape(case: Case) -> tuple[int, ...]:
    assert case.grid is not None
    return (case.batch, *case.grid, case.heads * case.head_dim)


def _plan(case: Case) -> Plan:
    """Space, then time, then space again: with two token dims, the two switches of one layer."""
    dims = _token_dims(case)
    stages = tuple(
        Stage(f"stages.{index}", computes_along=(dims[dim],), follows={_ROWS: f"{dims[0]} c"})
        for index, dim in enumerate(_order(case))
    )
    return Plan(tokens=" ".join(["b", *dims, "c"]), stages=stages)


def _order(case: Case) -> list[int]:
    """The token dim that each stage computes along."""
    assert case.grid is not None
    last = len(case.grid) - 1
    return [*range(last, -1, -1), last]


def _inputs(case: Case, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(case.seed)
    shape = _shape(case)
    shapes = {_X: shape, _CONDITION: (shape[0], shape[-1]), _ROWS: (shape[1], shape[-1]), "dout": shape}
    drawn = {
        name: torch.randn(dims, generator=generator, dtype=torch.float64).to(device, case.dtype)
        for name, dims in shapes.items()
    }
    return drawn, drawn.pop("dout")


def _run(model: nn.Module, inputs: dict[str, Tensor], dout: Tensor) -> dict[str, Tensor]:
    """The output, and the gradient of everything: every rank's loss is the whole one, which is also their mean."""
    model.zero_grad()
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    out = model(**leaves)
    out.backward(dout)
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    grads |= {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    return {"out": out.detach(), **{f"d {name}": grad for name, grad in grads.items() if grad is not None}}


def _means(tensors: dict[str, Tensor], axis: Axis) -> dict[str, Tensor]:
    """The means over ranks, in fp64, as a framework takes them of parameter gradients."""
    flat = torch.cat([x.double().flatten() for x in tensors.values()]) / axis.size
    if axis.size > 1:
        dist.all_reduce(flat, group=axis.group)
    parts = flat.split([x.numel() for x in tensors.values()])
    return {name: part.view(x.shape) for (name, x), part in zip(tensors.items(), parts, strict=True)}


class _AxialStack(nn.Module):
    """Stages of attention, each along one token dim of ``[B, *grid, C]``."""

    def __init__(self, case: Case, attend: Attend) -> None:
        super().__init__()
        order = _order(case)
        self.enter = _weight(case, 0, case.heads * case.head_dim, case.heads * case.head_dim)
        self.condition = _weight(case, 1, case.heads * case.head_dim, case.heads * case.head_dim)
        self.stages = nn.ModuleList(
            _AxialAttention(case, attend, 1 + dim, seed=10 * (index + 1)) for index, dim in enumerate(order)
        )
        self.leave = _weight(case, 2, case.heads * case.head_dim, case.heads * case.head_dim)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor) -> Tensor:
        x = x @ self.enter
        condition = (condition @ self.condition).tanh()
        for stage in self.stages:
            x = stage(x, condition, rows)
        return x @ self.leave


class _AxialAttention(nn.Module):
    """Attention along dim ``along``, scaled by a condition per sample and shifted by a row per time step."""

    def __init__(self, case: Case, attend: Attend, along: int, seed: int) -> None:
        super().__init__()
        width = case.heads * case.head_dim
        self._along, self._attend = along, attend
        self._mask = case.mask if along == 1 else MaskSpec()
        self.queries = _weight(case, seed, width, case.heads, case.head_dim)
        self.keys = _weight(case, seed + 1, width, case.kv_heads, case.head_dim)
        self.values = _weight(case, seed + 2, width, case.kv_heads, case.v_dim)
        self.out = _weight(case, seed + 3, case.heads, case.v_dim, width)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor) -> Tensor:
        rest = x.dim() - 2
        scaled = F.layer_norm(x, x.shape[-1:]) * (1 + condition.view(len(condition), *[1] * rest, condition.shape[-1]))
        scaled = scaled + rows.view(1, len(rows), *[1] * (rest - 1), rows.shape[-1])
        lines = scaled.movedim(self._along, -2)
        q, k, v = (
            torch.tensordot(lines, weight, 1).flatten(0, -4) for weight in (self.queries, self.keys, self.values)
        )
        out = torch.tensordot(self._attend(q, k, v, mask=self._mask), self.out, 2)
        return x + out.view(lines.shape).movedim(-2, self._along)


def _weight(case: Case, seed: int, *shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(1000 * case.seed + seed)
    fan_in = shape[0] if len(shape) < 3 or shape[0] == case.heads * case.head_dim else shape[0] * shape[1]
    return nn.Parameter(torch.randn(shape, generator=generator) * fan_in**-0.5)
