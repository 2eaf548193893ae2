"""Which cases are illegal, or cannot run here, and why."""

from __future__ import annotations

import torch

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.kernels import linear_fla
from dsp_plugin.kernels.linear import LINEAR_KERNELS
from dsp_plugin.kernels.table import choose
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.head_partition import head_partition
from dsp_plugin.methods.head_rounds import check
from dsp_plugin.verification.cases import Case, known


def refusal(case: Case, device: torch.device | str = "cpu") -> str | None:
    """Why the case is illegal, or cannot run on ``device``; None if it can. The same on every rank, nothing is sent."""
    method = METHODS[case.method]
    reasons = []
    if case.layout not in method.layouts:
        reasons.append(f"layout={case.layout!r}: method {case.method} takes {', '.join(method.layouts)}.")
    if case.by_document and (case.layout != "zigzag" or case.mask.cu_seqlens is None):
        reasons.append(
            f"by_document cuts the documents of a packed mask in a zigzag layout; the mask is {case.mask.describe()} "
            f"and the layout {case.layout}."
        )
    elif case.heads % case.kv_heads:
        reasons.append(f"heads={case.heads} is not a multiple of kv_heads={case.kv_heads}: fix the head counts.")
    else:
        reasons += method.illegal(case.workload())
    if case.dropout and method.kind == "switch":
        reasons.append(f"dropout={case.dropout}: {case.method} never looks inside attention; verify it without.")
    if method.kind == "linear":
        reasons += _no_linear_attention(case)
    if reasons:
        return " ".join(reasons)
    try:
        case.mask.documents(case.masked_length)
        if case.attention_rounds != 1:
            _check_rounds(case)
        if method.kind == "linear":
            _check_linear_kernel(case.kernel, torch.device(device), case.dtype)
        else:
            choose(case.attention(), device, case.dtype, case.head_dim, case.v_dim)
    except (SequenceParallelConfigError, UnsupportedError) as error:
        return str(error)
    return None


def _check_rounds(case: Case) -> None:
    method = METHODS[case.method]
    if "attention_rounds" not in method.settings:
        raise SequenceParallelConfigError(
            setting="attention_rounds",
            value=case.attention_rounds,
            why=f"{case.method} gathers no tokens",
            remedy="verify it without",
        )
    part = head_partition(case.heads, case.kv_heads, case.ulysses_size or case.size)
    check(case.attention_rounds, part, whole_groups="ring" in method.axes)


def _no_linear_attention(case: Case) -> list[str]:
    """What linear attention does not have, whichever the method."""
    reasons = []
    if not case.mask.causal and (case.decay != "none" or case.states):
        reasons.append(
            f"mask={case.mask.describe()!r} with decay={case.decay!r}: decays, delta rules and states are about what "
            "came before, so only causal attention has them. Verify bidirectional attention with decay none."
        )
    if case.dropout:
        reasons.append(f"dropout={case.dropout}: linear attention has no weights to drop; verify it without.")
    return reasons


def _check_linear_kernel(name: str, device: torch.device, dtype: torch.dtype) -> None:
    known("kernel", name, LINEAR_KERNELS)
    unusable = linear_fla.unusable(device, dtype) if name == "fla" else None
    if unusable is not None:
        raise UnsupportedError(setting="kernel", value=name, why=unusable, remedy="use 'auto' or 'chunked'")
