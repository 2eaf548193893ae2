"""Verification of linear attention: one call, with gradients to everything that goes in.

The oracle runs token by token. What every rank is given whole, fixed decays and the initial state, gets its gradient as
parameters do: the sum over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dsp_plugin.comm import ledger
from dsp_plugin.comm.axis import Axis
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.kernels.linear import linear_attention
from dsp_plugin.kernels.linear_reference import token_recurrence
from dsp_plugin.kernels.merge import accumulation_dtype
from dsp_plugin.methods import METHODS, Where
from dsp_plugin.verification.cases import Case
from dsp_plugin.verification.report import TOLERANCES, RankReport, WireCheck, judge

SEQUENCE_DIM = 1

# Tensors by name: q, k, v, g, beta, initial_state, and the gradients that come in, dout and dfinal.
Tensors = dict[str, Tensor]
Attend = Callable[..., tuple[Tensor, Tensor | None]]


def verify(case: Case, groups: SequenceParallelGroups, device: torch.device) -> RankReport:
    """Run the method on this rank's shard, and the oracle on the whole, which every rank can make from the seed."""
    method = METHODS[case.method]
    assert method.attention is not None
    layout, axis = case.tokens(), groups.sp
    whole = draw(case, device)
    replicated = {"initial_state"} | ({"g"} if case.decay == "head" else set())

    def shard(x: Tensor) -> Tensor:
        return layout.shard(x, SEQUENCE_DIM, axis.rank)

    def own(states: Tensor) -> Tensor:
        return states[axis.rank]

    local = {name: x if name in replicated else shard(x) for name, x in whole.items() if name != "dfinal"}
    if case.states:
        local["dfinal"] = own(whole["dfinal"])
    settings = {name: getattr(case, name) for name in method.settings}
    sharded = partial(
        method.attention, where=Where(groups, layout), kernel=case.kernel, output_final_state=case.states, **settings
    )
    with ledger() as log:
        got = _differentiate(case, _with_state(sharded, case.states), local)
    for name in sorted(replicated & whole.keys()):
        got[f"d{name}"] = _sum(got[f"d{name}"], axis)

    ends = list(accumulate(layout.sizes))
    oracle = _differentiate(case, _stateful(token_recurrence, ends, case), {n: x.double() for n, x in whole.items()})
    # Only the limits of 16 bits depend on it.
    rounded = case.dtype not in TOLERANCES
    unsharded = _differentiate(case, _stateful(_unsharded(case), ends, case), whole) if rounded else {}
    uncut = {f"d{name}": _whole for name in replicated} | {"final state": own}
    distances = judge(got, oracle, unsharded, case.dtype, part=shard, other_parts=uncut)
    formula = method.wire_bytes(case.workload(), axis.rank)
    # Not by method name: nothing else may be sent either.
    forward, backward = log.bytes(phase="forward"), log.bytes(phase="backward")
    check = WireCheck("one attention call", axis.rank, forward, formula.forward, backward, formula.backward)
    return RankReport(tuple(distances), (check,))


def draw(case: Case, device: torch.device | str = "cpu") -> Tensors:
    """The whole inputs of a case and the gradients of its outputs, from its seed.

    Returns:
        ``q`` and ``k [B, L, Hk, K]``, ``v`` and ``dout [B, L, H, V]``; by the decay ``g`` and ``beta``; with states
        also ``initial_state [B, H, K, V]`` and ``dfinal [P, B, H, K, V]``, of the state after every rank's last token.
        Gates and states of 16-bit cases are fp32.
    """
    generator = torch.Generator().manual_seed(case.seed)
    tokens = (case.batch, case.length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k = (normal(*tokens, case.kv_heads, case.head_dim) for _ in range(2))
    v, dout = (normal(*tokens, case.heads, case.v_dim) for _ in range(2))
    narrow: Tensors = {"q": q, "k": k, "v": v, "dout": dout}
    wide: Tensors = {}
    if case.decay in ("delta", "gated-delta", "kda"):
        # As models do, so that no transition grows the state.
        narrow["k"] = F.normalize(k, dim=-1)
        wide["beta"] = normal(*tokens, case.heads).sigmoid()
    shapes = {
        "head": (case.heads,),
        "scalar": (*tokens, case.heads),
        "gated-delta": (*tokens, case.heads),
        "vector": (*tokens, case.heads, case.head_dim),
        "kda": (*tokens, case.heads, case.head_dim),
    }
    if case.decay in shapes:
        wide["g"] = _GATES[case.gates](normal(*shapes[case.decay]))
    if case.states:
        state = (case.batch, case.heads, case.head_dim, case.v_dim)
        wide |= {"initial_state": normal(*state), "dfinal": normal(case.size, *state)}
    drawn = {name: x.to(case.dtype) for name, x in narrow.items()}
    drawn |= {name: x.to(accumulation_dtype(case.dtype)) for name, x in wide.items()}
    return {name: x.to(device) for name, x in drawn.items()}


# Log decays from standard normal numbers. Strong ones are -30 at the least and near 0 here and there.
_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "moderate": F.logsigmoid,
    "strong": lambda x: -30.0 * x.sigmoid().square(),
    "weak": lambda x: -1e-4 * x.abs(),
}


def _differentiate(case: Case, attend: Attend, tensors: Tensors) -> Tensors:
    """The output and final state, and the gradients of all inputs."""
    given = {name: x for name, x in tensors.items() if name not in ("dout", "dfinal")}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    out, final = attend(**leaves, causal=case.mask.causal, cu_seqlens=case.mask.cu_seqlens)
    outputs, incoming, results = [out], [tensors["dout"]], {"out": out.detach()}
    if final is not None:
        outputs, incoming = [*outputs, final], [*incoming, tensors["dfinal"].to(final.dtype)]
        results["final state"] = final.detach()
    # An input without a gradient is an error: frameworks wait for the gradient of every parameter on every rank.
    grads = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _with_state(attend: Callable[..., Any], states: bool) -> Attend:
    """``attend``, returning a pair whether or not the state was asked for."""

    def pair(*args: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
        result = attend(*args, **settings)
        return result if states else (result, None)

    return pair


def _unsharded(case: Case) -> Attend:
    local = partial(linear_attention, kernel=case.kernel, output_final_state=case.states)
    return _with_state(local, case.states)


def _stateful(attend: Attend, ends: Sequence[int], case: Case) -> Attend:
    """``attend`` on the whole, with the states ``[P, B, H, K, V]`` after the tokens of every rank.

    The state after ``end`` tokens is, by definition, the final state of attention to these tokens alone.
    """

    def whole(**inputs: Any) -> tuple[Tensor, Tensor | None]:
        out, _ = attend(**inputs)
        if not case.states:
            return out, None
        states = []
        for end in ends:
            beginning = {name: _beginning(name, x, end) for name, x in inputs.items()}
            _, state = attend(**beginning)
            assert state is not None
            states.append(state)
        return out, torch.stack(states)

    return whole


def _beginning(name: str, x: Any, end: int) -> Any:
    """What is left of an argument of an attention call when only the first ``end`` tokens are there."""
    if name == "cu_seqlens":
        return x if x is None else tuple(min(border, end) for border in x)
    if not isinstance(x, Tensor) or name == "initial_state" or x.dim() == 1:
        return x
    return x[:, :end]


def _whole(x: Tensor) -> Tensor:
    return x


def _sum(x: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks, in fp64, as a framework takes it of parameter gradients."""
    total = x.double()
    if axis.size > 1:
        dist.all_reduce(total, group=axis.group)
    return total
