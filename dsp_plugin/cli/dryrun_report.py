"""What `dsp-plugin dry-run` prints: bytes sent, memory, who holds its peak, and what a rank needs in all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsp_plugin.cli.device_report import device_report, show_device
from dsp_plugin.cli.output import new_console, print_table
from dsp_plugin.rehearsal.budget import Need, needs
from dsp_plugin.rehearsal.dryrun import Job, RankRun
from dsp_plugin.rehearsal.longest import Longest
from dsp_plugin.rehearsal.model_states import model_states

MOST_HOLDERS = 15
STAGES = range(4)


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        stage: of ZeRO that memory limits are compared with.
        offload: of model states, in `budget.OFFLOADS`.
        device_memory, host_memory: bytes of one rank; None for no limit.
    """

    model: str
    job: Job
    world_size: int
    rank: int
    stage: int
    offload: str
    device_memory: int | None
    host_memory: int | None

    def needs(self, run: RankRun) -> list[Need]:
        """What a rank needs, by how model states are sharded."""
        return needs(run, self.job.dtype, self.world_size, self.offload)

    def chosen(self, run: RankRun) -> Need:
        """What limits are compared with."""
        found = self.needs(run)
        return found[self.stage] if len(found) > 1 else found[0]

    def excess(self, run: RankRun) -> int:
        """By how many bytes a rank needs more than there is; negative where there is some to spare."""
        needed = self.chosen(run)
        limits = ((needed.total, self.device_memory), (needed.host, self.host_memory))
        return max((used - limit for used, limit in limits if limit is not None), default=0)


def report(
    request: Request, runs: Mapping[str, RankRun], differs: Sequence[str], longest: Longest | None
) -> dict[str, Any]:
    """All of it, in bytes."""
    dry, job = runs["dry"], request.job
    parameters = dry.parameter_count
    return {
        "model": request.model,
        "method": job.config.method,
        "size": job.config.size,
        "world_size": request.world_size,
        "rank": request.rank,
        "dtype": str(job.dtype).removeprefix("torch."),
        "checkpoint": job.recompute,
        "parameters": parameters,
        "runs": {
            name: {
                "bytes": run.nbytes,
                "ledger": [row._asdict() for row in run.rows],
                "memory": run.memory._asdict(),
                "operators": run.operators,
                "device": None if run.asked is None else device_report(run.asked),
            }
            for name, run in runs.items()
        },
        "holders_of_the_peak_of_activations": [holder._asdict() for holder in _holders(dry)],
        "planned_bytes_of_all_ranks": plan.total if (plan := dry.stage_plan) is not None else None,
        "arithmetic_model_states_by_zero_stage": {
            str(stage): model_states(parameters, job.dtype, request.world_size, stage)._asdict() for stage in STAGES
        },
        "needs": [needed._asdict() for needed in request.needs(dry)],
        "zero": request.stage,
        "zero_offload": request.offload,
        "device_memory": request.device_memory,
        "host_memory": request.host_memory,
        "excess": request.excess(dry),
        "longest": None if longest is None else longest._asdict(),
        "ok": not differs,
        "differences": list(differs),
    }


def show(request: Request, runs: Mapping[str, RankRun], differs: Sequence[str], longest: Longest | None) -> None:
    """All of it, as tables."""
    job, dry = request.job, runs["dry"]
    console = new_console()
    title = (
        f"{request.model}: rank {request.rank} of {request.world_size}, {job.config.method} of size {job.config.size}, "
        "one training step"
    )
    kinds = sorted({row[:4] for run in runs.values() for row in run.rows})
    sent = [
        [*kind, *(f"{sum(row.bytes for row in run.rows if row[:4] == kind):,}" for run in runs.values())]
        for kind in kinds
    ]
    total = ["all", "", "", "", *(f"{run.nbytes:,}" for run in runs.values())]
    headers = ["method", "collective", "group", "phase", *runs]
    print_table(console, f"{title}: bytes sent", headers, [*sent, total])
    memory = [[name, *(f"{getattr(run.memory, name):,}" for run in runs.values())] for name in dry.memory._fields]
    ratios = ["peak / dry", *(f"{run.memory.peak / dry.memory.peak:.3f}" for run in runs.values())]
    print_table(console, "Memory in bytes", ["", *runs], [*memory, ratios])
    if dry.asked is not None:
        show_device(console, dry.asked)
    else:
        console.print(
            f"Operators that launch kernels in the step: {dry.operators:,}, optimizer not included.", soft_wrap=True
        )
        console.print()
    most = max(dry.memory.activations, 1)
    held = [
        [*holder[:3], str(holder.tensors), f"{holder.nbytes:,}", f"{holder.nbytes / most:.1%}"]
        for holder in _holders(dry)
    ]
    heading = f"Who holds the peak of activations, the {MOST_HOLDERS} that hold the most"
    print_table(console, heading, ["module", "operator", "phase", "tensors", "bytes", "share"], held)
    if dry.stage_plan is not None:
        planned = f"{dry.stage_plan.total:,} bytes of all {job.config.size} ranks of a sequence"
        console.print(f"The stage table, which dsp-plugin plan-stages shows, says {planned}.", soft_wrap=True)
        console.print()
    _show_needs(console, request, dry)
    if request.device_memory is not None or request.host_memory is not None:
        console.print(_verdict(request, dry), soft_wrap=True)
    if longest is not None:
        console.print(_in_words(longest), soft_wrap=True)
    for line in differs:
        console.print(f"DIFFERS {line}", soft_wrap=True)


def _holders(run: RankRun) -> list[Any]:
    assert run.timeline is not None
    return run.timeline.holders(run.gradients)[:MOST_HOLDERS]


def _show_needs(console: Any, request: Request, dry: RankRun) -> None:
    offloaded = {
        "none": "",
        "optimizer": ", the optimizer in host memory",
        "all": ", all of them in host memory under stage 3",
    }
    how = f"under ZeRO over {request.world_size} ranks, with Adam{offloaded[request.offload]}"
    if dry.library is not None:
        how = f"of this rank's share, the same on {dry.library.replicas} ranks, with Adam"
        how += f"; microbatches in flight {dry.library.in_flight}"
    heading = f"By arithmetic, not run: bytes of model states {how}; with inputs and activations, what a rank needs"
    rows = [[needed.states, *(f"{value:,}" for value in needed[1:])] for needed in request.needs(dry)]
    print_table(console, heading, list(Need._fields), rows)


def _verdict(request: Request, dry: RankRun) -> str:
    needed = request.chosen(dry)
    said = []
    for what, used, limit in (
        ("device memory", needed.total, request.device_memory),
        ("host memory", needed.host, request.host_memory),
    ):
        if limit is None:
            continue
        spare = f"{abs(limit - used):,} bytes ({abs(limit - used) / 2**30:.2f} GiB)"
        fits = f"{spare} to spare: it fits" if used <= limit else f"{spare} too many: it does not fit"
        said.append(f"{needed.states} needs {used:,} of {limit:,} bytes of {what}, {fits}.")
    return "\n".join(said)


def _in_words(found: Longest) -> str:
    line = (
        f"a token of the sequence costs {found.slope:,.1f} bytes, lengths tried were {', '.join(map(str, found.tried))}"
    )
    if not found.length:
        return f"Not even {min(found.tried):,} tokens fit; {line}."
    return f"The longest sequence that fits has {found.length:,} tokens; {line}."
