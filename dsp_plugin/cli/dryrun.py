"""The command `dsp-plugin dry-run`: bytes and memory of one rank of a large world, beside a real run if it is small."""

from __future__ import annotations

import json
from functools import partial
from math import gcd
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from dsp_plugin.cli.dryrun_report import Request, report, show
from dsp_plugin.cli.output import FAILED, AsJson, Patience, one_of, print_json, rank_failures, user_errors
from dsp_plugin.cli.timeline_svg import timeline_svg
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.rehearsal.budget import OFFLOADS
from dsp_plugin.rehearsal.dryrun import Job, RankRun, dry_run, real_run
from dsp_plugin.rehearsal.longest import Longest, longest
from dsp_plugin.rehearsal.subject import KNOWN_SUBJECTS, LIBRARIES, parse_settings, subject
from dsp_plugin.verification.cases import DTYPES

# How far the memory of the real run may be from what the dry run said, as a part of it.
MEMORY_TOLERANCE = 0.10
MAX = "max"
# Tokens on a rank: of the first run of a search, and between the lengths that it tries.
_FIRST, _STEP = 4096, 256


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("dry-run")(dry_run_command)


def dry_run_command(
    model: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(KNOWN_SUBJECTS)}; hf:llama-8b, hf:config.json or hf:FOLDER; megatron:FILE of arguments; "
            "or package.module:function."
        ),
    ],
    method: Annotated[str, typer.Option(help="The method.")] = "dsp",
    size: Annotated[int, typer.Option(min=1, help="Ranks that share one sequence.")] = 1,
    world_size: Annotated[int | None, typer.Option(min=1, help="All ranks; as many as --size if left out.")] = None,
    rank: Annotated[int, typer.Option(min=0, help="Whose step it is.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Argument of the model's function.")
    ] = None,
    length: Annotated[str | None, typer.Option(help=f"Tokens of a sequence, or {MAX}: the longest that fits.")] = None,
    plan: Annotated[str | None, typer.Option(help="package.module:name of its plan, for a model not known.")] = None,
    memory: Annotated[str | None, typer.Option(help="What is traded for memory: auto, or a section in JSON.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Of the weights, one of {', '.join(DTYPES)}; bfloat16 for hf and megatron, else float32."),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="Glob over module names: what is recomputed in the backward pass.")
    ] = None,
    zero: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage that memory is compared with.")] = 3,
    zero_offload: Annotated[
        str, typer.Option(help=f"Model states in host memory, as DeepSpeed offloads them: {', '.join(OFFLOADS)}.")
    ] = "none",
    device_memory: Annotated[str | None, typer.Option(help="Of a rank, such as 80GB or 76GiB.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="Of a rank, likewise.")] = None,
    device: Annotated[str, typer.Option(help="Whose kernels: cpu.")] = "cpu",
    timeline: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Plot memory over the step, by module.")
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
        check_device(device)
        config = SequenceParallelConfig(method=method, size=size, plan=plan, **_memory_section(memory))
        named = parse_settings(settings or [])
        library = model.partition(":")[0] in LIBRARIES
        types = DTYPES[one_of("--dtype", dtype or ("bfloat16" if library else "float32"), DTYPES)]
        world_size = world_size or size
        amounts = {
            "device_memory": _amount("--device-memory", device_memory),
            "host_memory": _amount("--host-memory", host_memory),
        }

        def request(tokens: int | None) -> Request:
            given = named if tokens is None else {**named, "length": tokens}
            job = Job(partial(subject, model, given), config, types, checkpoint)
            offload = one_of("--zero-offload", zero_offload, OFFLOADS)
            return Request(model, job, world_size, rank, zero, offload, **amounts)

        if real and world_size != size:
            raise SequenceParallelConfigError(
                setting="--real",
                why=f"one sequence group of {size} ranks is spawned, not a world of {world_size}",
                remedy="leave --world-size out; what a rank sends does not depend on the other groups",
            )
        found = None
        if length == MAX:
            found, asked, dry = _search(request, size)
        else:
            asked = request(None if length is None else _tokens(length))
            dry = dry_run(asked.job, world_size, rank)
        runs = {"dry": dry}
        if unsharded:
            alone = SequenceParallelConfig(method=method, size=1, plan=plan, **_memory_section(memory))
            runs["unsharded"] = dry_run(Job(asked.job.build, alone, types, checkpoint), 1)
        if real:
            with rank_failures():
                runs["real"] = real_run(asked.job, timeout)[rank]
        if timeline is not None:
            timeline.write_text(timeline_svg(f"{model}, {method} of size {size}: rank {rank}", dry))
    differs = _differences(runs["dry"], runs["real"]) if real else []
    if as_json:
        print_json(report(asked, runs, differs, found))
    else:
        show(asked, runs, differs, found)
    raise typer.Exit(FAILED if differs else 0)


def check_device(device: str) -> None:
    """Raises: UnsupportedError: kernels of another device than the CPU are asked for."""
    if device != "cpu":
        raise UnsupportedError(
            setting="--device",
            value=device,
            why="see docs/dry-run.md",
            remedy="leave --device out",
        )


def _search(request: Any, size: int) -> tuple[Longest, Request, RankRun]:
    """The longest sequence that fits, and its run; that of the shortest tried where none does."""
    first: Request = request(None)
    if first.device_memory is None and first.host_memory is None:
        raise SequenceParallelConfigError(
            setting="--length",
            value=MAX,
            why="any length fits where there is no limit",
            remedy="say --device-memory 80GB, and --host-memory where something is offloaded",
        )
    runs: dict[int, tuple[Request, RankRun]] = {}

    def excess(tokens: int) -> int:
        asked = request(tokens)
        runs[tokens] = asked, dry_run(asked.job, asked.world_size, asked.rank)
        return asked.excess(runs[tokens][1])

    step = size * _STEP // gcd(size, _STEP)
    found = longest(excess, step, -(-size * _FIRST // step) * step)
    return found, *runs[found.length or min(runs)]


def _memory_section(given: str | None) -> dict[str, Any]:
    if given is None:
        return {}
    try:
        return {"memory": given if given == "auto" else json.loads(given)}
    except json.JSONDecodeError as error:
        raise SequenceParallelConfigError(
            setting="--memory",
            value=given,
            why=f"it is not JSON: {error}",
            remedy="write auto, or a section such as '{\"tile_tokens\": 2048}'",
        ) from error


def _tokens(given: str) -> int:
    if not given.isdecimal() or int(given) == 0:
        raise SequenceParallelConfigError(
            setting="--length",
            value=given,
            why=f"expected a number of tokens, or {MAX}",
            remedy="write --length 131072",
        )
    return int(given)


def _amount(option: str, given: str | None) -> int | None:
    try:
        return None if given is None else TypeAdapter(ByteSize).validate_python(given)
    except ValidationError as error:
        raise SequenceParallelConfigError(
            setting=option,
            value=given,
            why="it is no amount of memory",
            remedy="write 80GB (10^9 bytes each) or 76GiB (2^30)",
        ) from error


def _differences(dry: RankRun, real: RankRun) -> list[str]:
    """What the real run contradicts."""
    found = []
    if dry.rows != real.rows:
        found.append(f"bytes: dry run {dry.nbytes}, real run {real.nbytes}")
    if abs(real.memory.peak / dry.memory.peak - 1) > MEMORY_TOLERANCE:
        found.append(f"peak memory: dry run {dry.memory.peak}, real run {real.memory.peak}")
    return found
