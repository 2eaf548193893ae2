"""The engine under `dsp-plugin verify`: methods against an fp64 oracle and their own byte formulas.

Judged on every rank: the output, every gradient, and the bytes that left it, forward and backward. Relative to the
oracle's largest value an error may be 1e-5 in fp32 and 1e-12 in fp64; in 16 bits it may be 1.5 times that of the
unsharded run, or 1e-5. Bytes must be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.methods import METHODS
from dsp_plugin.verification import attention, linear, switch
from dsp_plugin.verification.cases import Case
from dsp_plugin.verification.refusal import refusal
from dsp_plugin.verification.report import CaseResult, RankReport

Verifier = Callable[[Case, SequenceParallelGroups, torch.device], RankReport]

# By `Method.kind`.
VERIFIERS: dict[str, Verifier] = {"softmax": attention.verify, "linear": linear.verify, "switch": switch.verify}


def run_case(case: Case, groups: SequenceParallelGroups) -> CaseResult:
    """Verify one case. Every rank of the world calls this with the same case; each sequence group does the same work.

    Returns:
        The verdict over all ranks, the same on each. An illegal case comes back refused, and nothing is sent.
    """
    assert groups.sp.size == case.size, (groups.sp, case)
    device = _device()
    refused = refusal(case, device)
    if refused is not None:
        return CaseResult(case, refused=refused)
    report = VERIFIERS[METHODS[case.method].kind](case, groups, device)
    return CaseResult.merged(case, _from_all_ranks(report))


def run_cases(cases: Sequence[Case], done: Callable[[], None] = lambda: None) -> list[CaseResult]:
    """Verify cases on this rank of the world, calling ``done`` after each. Every rank is given the same cases.

    Raises:
        SequenceParallelConfigError: a size does not divide the world.
    """
    built: dict[tuple[int, int], SequenceParallelGroups] = {}
    results = []
    for case in cases:
        sizes = {} if case.ulysses_size is None else {"ulysses_size": case.ulysses_size}
        config = SequenceParallelConfig(method=case.method, size=case.size, **sizes)
        key = (config.size, config.ulysses_size)
        if key not in built:
            built[key] = SequenceParallelGroups.build(config)
        results.append(run_case(case, built[key]))
        done()
    return results


def _device() -> torch.device:
    if dist.is_initialized() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _from_all_ranks(report: RankReport) -> list[RankReport]:
    if not dist.is_initialized():
        return [report]
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    return reports
