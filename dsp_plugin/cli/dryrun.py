"""The command `dsp-plugin dry-run`: bytes and memory of one rank of a large world, beside a real run if it is small."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import ByteSize, TypeAdapter, ValidationError

from dsp_plugin.cli.dryrun_report import Request, report, show
from dsp_plugin.cli.output import FAILED, AsJson, Patience, one_of, print_json, rank_failures, user_errors
from dsp_plugin.cli.timeline_svg import timeline_svg
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.rehearsal.budget import OFFLOADS
from dsp_plugin.rehearsal.cuda import guard
from dsp_plugin.rehearsal.cuda.process import CudaProcess
from dsp_plugin.rehearsal.dryrun import Job, RankRun, dry_run, real_run
from dsp_plugin.rehearsal.longest import Longest, longest
from dsp_plugin.rehearsal.subject import KNOWN_SUBJECTS, LIBRARIES, Setting, parse_settings, section_of, subject
from dsp_plugin.verification.cases import DTYPES

# How far the memory of the real run may be from what the dry run said, as a part of it.
MEMORY_TOLERANCE = 0.10
MAX = "max"
# Tokens on a rank: of the first run of a search, and between the lengths that it tries.
_FIRST, _STEP = 65536, 256


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
    method: Annotated[
        str | None, typer.Option(help="The method; what Megatron's arguments say, or dsp, if left out.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Ranks that share one sequence; likewise, or 1.")] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="All ranks; as many as hold one model if left out.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Whose step it is; the pipeline stage that needs the most if left out.")
    ] = None,
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
    device: Annotated[
        str, typer.Option(help="Whose tensors and kernels are rehearsed: cpu, or cuda, without one.")
    ] = "cpu",
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
        process = _process(one_of("--device", device, ("cpu", "cuda")), model, real)
        given = section_of(model)
        model_ranks, stages = given.pop("model_ranks", 1), given.pop("stages", 1)
        config = _config(given, method=method, size=size, plan=plan, memory=_memory(memory))
        library = model.partition(":")[0] in LIBRARIES
        asked = Asked(
            model,
            config,
            parse_settings(settings or []),
            DTYPES[one_of("--dtype", dtype or ("bfloat16" if library else "float32"), DTYPES)],
            checkpoint,
            world_size or config.size * model_ranks,
            zero,
            one_of("--zero-offload", zero_offload, OFFLOADS),
            _amount("--device-memory", device_memory),
            _amount("--host-memory", host_memory),
            dry_run if process is None else partial(_on_cuda, process, timeout),
        )
        if real and asked.world_size != config.size * model_ranks:
            raise SequenceParallelConfigError(
                setting="--real",
                why=f"{config.size * model_ranks} ranks that hold one model are spawned, not a world of "
                f"{asked.world_size}",
                remedy="leave --world-size out; what a rank sends does not depend on the other groups",
            )
        stage = asked.world_size // stages
        ranks = [rank] if rank is not None else [0] if stages == 1 else [0, stage * (stages - 1)]
        found = None
        if length == MAX:
            found, request, dry = _search(asked, ranks)
        else:
            request, dry = asked.worst(None if length is None else _tokens(length), ranks)
        runs = {"dry": dry}
        if unsharded:
            alone = config.model_copy(update={"size": 1, "ulysses_size": 1, "ring_size": 1})
            runs["unsharded"] = asked.run(replace(request.job, config=alone), 1, 0)
        if real:
            with rank_failures():
                runs["real"] = real_run(request.job, timeout, asked.world_size)[request.rank]
        if timeline is not None:
            title = f"{model}, {config.method} of size {config.size}: rank {request.rank} of {asked.world_size}"
            timeline.write_text(timeline_svg(title, dry))
    differs = _differences(runs["dry"], runs["real"]) if real else []
    if as_json:
        print_json(report(request, runs, differs, found))
    else:
        show(request, runs, differs, found)
    raise typer.Exit(FAILED if differs else 0)


@dataclass(frozen=True)
class Asked:
    """What does not depend on the length of the sequence; fields as in `Request` and `Job`."""

    model: str
    config: SequenceParallelConfig
    settings: dict[str, Setting]
    dtype: torch.dtype
    recompute: str | None
    world_size: int
    stage: int
    offload: str
    device_memory: int | None
    host_memory: int | None
    run: Callable[[Job, int, int], RankRun]

    def worst(self, tokens: int | None, ranks: list[int]) -> tuple[Request, RankRun]:
        """Of the dry runs of some ranks the one that needs the most, and what it was asked for."""
        settings = self.settings if tokens is None else {**self.settings, "length": tokens}
        build = partial(subject, self.model, settings, self.config)
        job = Job(build, self.config, self.dtype, self.recompute)
        limits = self.stage, self.offload, self.device_memory, self.host_memory
        runs = []
        for rank in ranks:
            request = Request(self.model, job, self.world_size, rank, *limits)
            runs.append((request, self.run(job, self.world_size, rank)))
        return max(runs, key=lambda each: each[0].chosen(each[1]).total)


def _config(section: dict[str, Any], **options: Any) -> SequenceParallelConfig:
    """Of what the model says itself and what was asked for beside it."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in ("method", "size"):
        if name in section and given.get(name, section[name]) != section[name]:
            raise SequenceParallelConfigError(
                setting=f"--{name}",
                value=given[name],
                why=f"the file of arguments says {section[name]}",
                remedy=f"leave --{name} out, or change the file",
            )
    return SequenceParallelConfig(**{"method": "dsp", "size": 1, **section, **given})


def _process(device: str, model: str, real: bool) -> CudaProcess | None:
    """Where runs are on CUDA; None for this process, on the CPU."""
    if device == "cpu":
        return None
    why = ""
    if model.startswith("megatron:"):
        why = "Megatron-core runs in CPU mode in a dry run, which answers every question for a GPU by the CPU"
    elif real:
        why = "ranks of --real run on the CPU, and would be compared with a run on another device"
    else:
        try:
            guard.built()
        except RuntimeError as error:
            why = f"the device is a small extension of torch, and {' '.join(str(error).split())}"
    if why:
        raise UnsupportedError(
            setting="--device",
            value=device,
            why=why,
            remedy="leave --device out: bytes and memory are the same, and attention is a flash kernel on the CPU, too",
        )
    return CudaProcess()


def _on_cuda(process: CudaProcess, timeout: float, job: Job, world_size: int, rank: int) -> RankRun:
    found: RankRun = process.run(dry_run, job, world_size, rank, "cuda", timeout=timeout)
    return found


def _search(asked: Asked, ranks: list[int]) -> tuple[Longest, Request, RankRun]:
    """The longest sequence that fits, and its run; that of the shortest tried where none does."""
    if asked.device_memory is None and asked.host_memory is None:
        raise SequenceParallelConfigError(
            setting="--length",
            value=MAX,
            why="any length fits where there is no limit",
            remedy="say --device-memory 80GB, and --host-memory where something is offloaded",
        )
    runs: dict[int, tuple[Request, RankRun]] = {}

    def excess(tokens: int) -> int:
        runs[tokens] = request, run = asked.worst(tokens, ranks)
        return request.excess(run)

    step = asked.config.size * _STEP
    found = longest(excess, step, _FIRST // _STEP * step)
    return found, *runs[found.length or min(runs)]


def _memory(given: str | None) -> Any:
    try:
        return given if given is None or given == "auto" else json.loads(given)
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
