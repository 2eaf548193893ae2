"""The command `dsp-plugin dry-run`: bytes and memory of one rank of a large world, beside a real run if it is small."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

import typer

from dsp_plugin.cli.output import (
    FAILED,
    AsJson,
    Patience,
    new_console,
    one_of,
    print_json,
    print_table,
    rank_failures,
    user_errors,
)
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.rehearsal.dryrun import Job, RankRun, dry_run, real_run
from dsp_plugin.rehearsal.model_states import model_states
from dsp_plugin.rehearsal.subject import KNOWN_SUBJECTS, parse_settings, subject
from dsp_plugin.verification.cases import DTYPES

# How far the memory of the real run may be from what the dry run said, as a part of it.
MEMORY_TOLERANCE = 0.10


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("dry-run")(dry_run_command)


def dry_run_command(
    model: Annotated[str, typer.Option(help=f"{', '.join(KNOWN_SUBJECTS)}, or package.module:function.")],
    method: Annotated[str, typer.Option(help="The method.")] = "dsp",
    size: Annotated[int, typer.Option(min=1, help="Ranks that share one sequence.")] = 1,
    world_size: Annotated[int | None, typer.Option(min=1, help="All ranks; as many as --size if left out.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="Whose step it is.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Argument of the model's function.")
    ] = None,
    plan: Annotated[str | None, typer.Option(help="package.module:name of its plan, for a model not known.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the weights, one of {', '.join(DTYPES)}.")] = "float32",
    checkpoint: Annotated[
        str | None, typer.Option(help="Glob over module names: what is recomputed in the backward pass.")
    ] = None,
    unsharded: Annotated[bool, typer.Option("--unsharded", help="Show one rank that holds all, too.")] = False,
    real: Annotated[bool, typer.Option("--real", help="Run on spawned ranks as well, and compare.")] = False,
    timeout: Patience = 600.0,
    as_json: AsJson = False,
) -> None:
    """Bytes sent and peak memory of one training step of one rank, without data, devices or other ranks.

    Exit status: 0; 1 if --real differs (bytes at all, memory by more than 10%); 2 the request is illegal.
    """
    with user_errors(as_json):
        config = SequenceParallelConfig(method=method, size=size, plan=plan)
        build = partial(subject, model, parse_settings(settings or []))
        job = Job(build, config, DTYPES[one_of("--dtype", dtype, DTYPES)], checkpoint)
        world_size = world_size or size
        if real and world_size != size:
            raise SequenceParallelConfigError(
                setting="--real",
                why=f"one sequence group of {size} ranks is spawned, not a world of {world_size}",
                remedy="leave --world-size out; what a rank sends does not depend on the other groups",
            )
        runs = {"dry": dry_run(job, world_size, rank)}
        if unsharded:
            alone = SequenceParallelConfig(method=method, size=1, plan=plan)
            runs["unsharded"] = dry_run(Job(build, alone, job.dtype, checkpoint), 1)
        if real:
            with rank_failures():
                runs["real"] = real_run(job, timeout)[rank]
    differs = _differences(runs["dry"], runs["real"]) if real else []
    if as_json:
        print_json(_json(model, job, world_size, rank, runs, differs))
    else:
        _show(model, job, world_size, rank, runs, differs)
    raise typer.Exit(FAILED if differs else 0)


def _differences(dry: RankRun, real: RankRun) -> list[str]:
    """What the real run contradicts."""
    found = []
    if dry.rows != real.rows:
        found.append(f"bytes: dry run {dry.nbytes}, real run {real.nbytes}")
    if abs(_ratio(real, dry) - 1) > MEMORY_TOLERANCE:
        found.append(f"peak memory: dry run {dry.memory.peak}, real run {real.memory.peak}")
    return found


def _ratio(run: RankRun, dry: RankRun) -> float:
    return run.memory.peak / dry.memory.peak


def _json(
    model: str, job: Job, world_size: int, rank: int, runs: dict[str, RankRun], differs: Sequence[str]
) -> dict[str, Any]:
    parameters = runs["dry"].parameter_count
    return {
        "model": model,
        "method": job.config.method,
        "size": job.config.size,
        "world_size": world_size,
        "rank": rank,
        "dtype": str(job.dtype).removeprefix("torch."),
        "checkpoint": job.recompute,
        "parameters": parameters,
        "runs": {
            name: {
                "bytes": run.nbytes,
                "ledger": [row._asdict() for row in run.rows],
                "memory": run.memory._asdict(),
            }
            for name, run in runs.items()
        },
        "planned_bytes_of_all_ranks": plan.total if (plan := runs["dry"].stage_plan) is not None else None,
        "arithmetic_model_states_by_zero_stage": {
            str(stage): model_states(parameters, job.dtype, world_size, stage)._asdict() for stage in range(4)
        },
        "ok": not differs,
        "differences": list(differs),
    }


def _show(model: str, job: Job, world_size: int, rank: int, runs: dict[str, RankRun], differs: Sequence[str]) -> None:
    console, dry = new_console(), runs["dry"]
    title = f"{model}: rank {rank} of {world_size}, {job.config.method} of size {job.config.size}, one training step"
    kinds = sorted({row[:4] for run in runs.values() for row in run.rows})
    sent = [
        [*kind, *(f"{sum(row.bytes for row in run.rows if row[:4] == kind):,}" for run in runs.values())]
        for kind in kinds
    ]
    total = ["all", "", "", "", *(f"{run.nbytes:,}" for run in runs.values())]
    headers = ["method", "collective", "group", "phase", *runs]
    print_table(console, f"{title}: bytes sent", headers, [*sent, total])
    memory = [[name, *(f"{getattr(run.memory, name):,}" for run in runs.values())] for name in dry.memory._fields]
    ratios = ["peak / dry", *(f"{_ratio(run, dry):.3f}" for run in runs.values())]
    print_table(console, "Memory in bytes", ["", *runs], [*memory, ratios])
    if dry.stage_plan is not None:
        planned = f"{dry.stage_plan.total:,} bytes of all {job.config.size} ranks of a sequence"
        console.print(f"The stage table, which dsp-plugin plan-stages shows, says {planned}.", soft_wrap=True)
        console.print()
    states = [
        [str(stage), *(f"{value:,}" for value in model_states(dry.parameter_count, job.dtype, world_size, stage))]
        for stage in range(4)
    ]
    heading = f"By arithmetic, not run: bytes of model states under ZeRO over {world_size} ranks, with Adam"
    print_table(console, heading, ["stage", "weights", "gradients", "optimizer", "all"], states)
    for line in differs:
        console.print(f"DIFFERS {line}", soft_wrap=True)
