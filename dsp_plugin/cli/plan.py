"""The command `dsp-plugin plan`: how to train a model on so many GPUs, and why not otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any

import typer

from dsp_plugin.cli.output import FAILED, AsJson, new_console, one_of, print_json, print_table, user_errors
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.methods import METHODS
from dsp_plugin.planner import cluster as clusters
from dsp_plugin.planner.choice import RECOMPUTE, Judged, Task, choose, gib
from dsp_plugin.planner.cluster import DEFAULT_PRESET, PRESETS, Cluster
from dsp_plugin.planner.model_files import shapes_of, shipped
from dsp_plugin.planner.paste import flags, memory_section, remark, sections
from dsp_plugin.planner.shapes import Shapes

_FRAMEWORKS = ("deepspeed", "megatron")
_METHODS = tuple(name for name, method in METHODS.items() if method.kind == "softmax")
_HEADERS = ["method", "U x R", "TP", "PP", "states", "recompute", "memory", "tokens", "device", "host"]
_TIMES = ["step s", "compute s", "waiting s", "copies s", "tokens/s/GPU", "why not"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="plan")(plan)


def plan(
    model: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(shipped())}; a config.json of Transformers or its folder; or a file of Megatron's "
            "arguments."
        ),
    ],
    gpus: Annotated[int, typer.Option(min=1, help="GPUs.")],
    length: Annotated[str, typer.Option(help="Tokens of a sequence, as 131072, 128K or 1M; max for all that fit.")],
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of one node.")] = 8,
    hardware: Annotated[str, typer.Option(help=f"Defaults of what follows: {', '.join(PRESETS)}.")] = DEFAULT_PRESET,
    device_memory: Annotated[str | None, typer.Option(help="Of a GPU, as 80GiB.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="Of a node, as 1TiB.")] = None,
    intra: Annotated[str | None, typer.Option(help="Between GPUs of a node, of each and one way, as 450GB/s.")] = None,
    inter: Annotated[str | None, typer.Option(help="Between nodes, of each GPU and one way, as 400Gbit/s.")] = None,
    host_link: Annotated[str | None, typer.Option(help="Between a GPU and host memory, one way, as 64GB/s.")] = None,
    peak_tflops: Annotated[float | None, typer.Option(min=0.001, help="Of a GPU, dense, in bf16.")] = None,
    reserve: Annotated[str, typer.Option(help="Of a GPU's memory, left alone.")] = "4GiB",
    framework: Annotated[
        str | None, typer.Option(help="deepspeed or megatron; by default whose file the model is.")
    ] = None,
    micro_batches: Annotated[int, typer.Option(min=1, help="Sequences that a replica takes one after another.")] = 1,
    method: Annotated[list[str] | None, typer.Option(help="Only this one; may repeat.")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="Only this tensor-parallel size.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Only this pipeline-parallel size; Megatron only.")] = None,
    zero: Annotated[
        int | None, typer.Option(min=0, max=3, help="Only this stage; on Megatron 1 is its distributed optimizer.")
    ] = None,
    recompute: Annotated[str | None, typer.Option(help=f"Only this one of {', '.join(RECOMPUTE)}.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Alternatives to show.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Rank the ways to train a model on a cluster, each with the reason why it lost, and print the winner's settings.

    Memory and time are arithmetic, nothing is run: see docs/planning.md. Exit status: 0 something fits, 1 nothing does,
    2 the request is illegal.
    """
    with user_errors(as_json):
        preset = PRESETS[one_of("--hardware", hardware, PRESETS)]
        given = clusters.of_size(preset, gpus, gpus_per_node)
        given = _told(given, device_memory, host_memory, intra, inter, host_link, peak_tflops)
        shapes = shapes_of(model)
        framework = one_of("--framework", framework or _framework_of(model), _FRAMEWORKS)
        task = Task(
            shapes,
            given,
            "megatron" if framework == "megatron" else "deepspeed",
            None if length == "max" else clusters.tokens(length, "--length"),
            micro_batches,
            clusters.amount(reserve, "--reserve"),
            tuple(one_of("--method", name, _METHODS) for name in method or ()),
            tp,
            pp,
            zero,
            None if recompute is None else RECOMPUTE[RECOMPUTE.index(one_of("--recompute", recompute, RECOMPUTE))],
        )
        _check(task)
        found = choose(task)
    winner = found[0] if found[0].fits else None
    if as_json:
        print_json(_json(model, task, found, winner))
    else:
        _show(model, task, found[:rows], len(found), winner)
    raise typer.Exit(0 if winner is not None else FAILED)


def _told(
    given: Cluster,
    device_memory: str | None,
    host_memory: str | None,
    intra: str | None,
    inter: str | None,
    host_link: str | None,
    peak_tflops: float | None,
) -> Cluster:
    """With what the user says of it."""
    amounts = (("device_bytes", "--device-memory", device_memory), ("host_bytes", "--host-memory", host_memory))
    rates = (("intra", "--intra", intra), ("inter", "--inter", inter), ("host", "--host-link", host_link))
    told: dict[str, Any] = {name: clusters.amount(text, option) for name, option, text in amounts if text is not None}
    told |= {name: clusters.rate(text, option) for name, option, text in rates if text is not None}
    if peak_tflops is not None:
        told["flops"] = peak_tflops * 1e12
    return replace(given, **told)


def _framework_of(model: str) -> str:
    return "megatron" if model.endswith(".args") else "deepspeed"


def _check(task: Task) -> None:
    cluster, shapes = task.cluster, task.shapes
    if task.reserve >= cluster.device_bytes:
        raise SequenceParallelConfigError(
            setting="--reserve",
            value=gib(task.reserve),
            why=f"it leaves nothing of a device's {gib(cluster.device_bytes)}",
            remedy="lower it, or set --device-memory",
        )
    if task.framework == "deepspeed" and (task.pipeline or 1) > 1:
        raise SequenceParallelConfigError(
            setting="--pp",
            value=task.pipeline,
            why="DeepSpeed's pipelines are built of a list of layers, not of a model of Transformers",
            remedy="drop it, or set --framework megatron",
        )
    if task.framework == "megatron" and (task.stage or 0) > 1:
        raise SequenceParallelConfigError(
            setting="--zero",
            value=task.stage,
            why="Megatron-core's distributed optimizer shards the optimizer, which is stage 1",
            remedy="set 0 or 1, or set --framework deepspeed",
        )
    for option, size, counts in (
        ("--tp", task.tensor or 1, {"query heads": shapes.heads, "key/value heads": shapes.kv_heads}),
        ("--pp", task.pipeline or 1, {"layers": shapes.layers}),
    ):
        for what, count in counts.items():
            if count % size:
                raise SequenceParallelConfigError(
                    setting=option,
                    value=size,
                    why=f"it does not divide the {count} {what}: {count} / {size} leaves {count % size}",
                    remedy="choose a divisor",
                )
    product = (task.tensor or 1) * (task.pipeline or 1)
    if cluster.ranks % product:
        raise SequenceParallelConfigError(
            setting="--tp and --pp",
            why=f"{task.tensor or 1} * {task.pipeline or 1} = {product} does not divide the {cluster.ranks} GPUs",
            remedy="choose sizes whose product does",
        )


def _json(model: str, task: Task, found: list[Judged], winner: Judged | None) -> dict[str, Any]:
    return {
        "model": model,
        "parameters": task.shapes.parameters,
        "framework": task.framework,
        "ok": winner is not None,
        "winner": None if winner is None else _pasted(winner),
        "alternatives": [_alternative(each) for each in found],
    }


def _pasted(winner: Judged) -> dict[str, Any]:
    if winner.how.framework == "megatron":
        return {"length": winner.length, "flags": flags(winner.how, winner.length)}
    return {"length": winner.length, "config": sections(winner.how), "remark": remark(winner.how)}


def _alternative(each: Judged) -> dict[str, Any]:
    how, memory, time = each.how, each.memory, each.time
    return {
        "method": how.method,
        "ulysses_size": how.ulysses,
        "ring_size": how.ring,
        "tensor_parallel_size": how.tensor,
        "pipeline_parallel_size": how.pipeline,
        "states": how.states,
        "recompute": how.recompute,
        "memory": memory_section(how.memory),
        "length": each.length,
        "fits": each.fits,
        "device_bytes": None if memory is None else {**memory._asdict(), "total": memory.device},
        "seconds": None if time is None else {**time._asdict(), "step": time.step},
        "tokens_per_second_and_device": each.rate,
        "why_not": each.reason,
    }


def _show(model: str, task: Task, found: list[Judged], count: int, winner: Judged | None) -> None:
    console, cluster, shapes = new_console(), task.cluster, task.shapes
    title = (
        f"{model}, {shapes.parameters / 1e9:.2f}B parameters, {task.framework}, {cluster.ranks} GPUs in nodes of "
        f"{cluster.node}, {gib(task.device_bytes)} of each"
    )
    print_table(console, title, [*_HEADERS, *_TIMES], [_row(each) for each in found])
    if count > len(found):
        console.print(f"{count - len(found)} more are not shown: set --rows {count}, or --json.", soft_wrap=True)
    if winner is None:
        console.print("Nothing fits. Use more GPUs, or shorter sequences.", soft_wrap=True)
        return
    _say_positions(console, shapes, winner.length)
    if winner.how.framework == "megatron":
        console.print(" \\\n    ".join(flags(winner.how, winner.length)), soft_wrap=True)
        return
    console.print(json.dumps(sections(winner.how), indent=2), soft_wrap=True)
    console.print(remark(winner.how), soft_wrap=True)


def _say_positions(console: Any, shapes: Shapes, length: int) -> None:
    if shapes.positions is not None and length > shapes.positions:
        console.print(
            f"The model was made for {shapes.positions:,} positions, and {length:,} are more: its rotary embeddings "
            "have to be scaled.",
            soft_wrap=True,
        )


def _row(each: Judged) -> list[str]:
    how, memory, time = each.how, each.memory, each.time
    parts = memory_section(how.memory)
    cells = [
        how.method if how.size > 1 else "none",
        f"{how.ulysses} x {how.ring}",
        str(how.tensor),
        str(how.pipeline),
        how.states,
        how.recompute,
        ", ".join(f"{name} {value if value is not True else 'all'}" for name, value in parts.items()) or "-",
        f"{each.length:,}",
    ]
    if memory is None or time is None:
        return [*cells[:4], "", "", "", cells[-1], *[""] * 7, each.reason]
    waiting = time.exchange + time.states + time.tensor + time.bubble
    figures = [time.step, time.products + time.attention + time.optimizer, waiting, time.copies]
    return [
        *cells,
        gib(memory.device),
        gib(memory.host),
        *(f"{figure:.3g}" for figure in figures),
        f"{each.rate:.4g}",
        each.reason,
    ]
