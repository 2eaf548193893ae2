"""The command line: `dsp-plugin doctor`, `verify`, `verify-model`, `plan`, `plan-stages`, `dry-run` and `demo`."""

from __future__ import annotations

import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dsp_plugin.cli import doctor as findings
from dsp_plugin.cli import dryrun as cli_dryrun
from dsp_plugin.cli import own_model as cli_own_model
from dsp_plugin.cli import plan as cli_plan
from dsp_plugin.cli import plans as cli_plans
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
from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.layout import LAYOUTS
from dsp_plugin.methods.state_exchange import EXCHANGES
from dsp_plugin.verification.cases import DTYPES, Case, default_cases
from dsp_plugin.verification.refusal import refusal
from dsp_plugin.verification.report import HALF_PRECISION_FACTOR, HALF_PRECISION_FLOOR, TOLERANCES, CaseResult
from dsp_plugin.verification.world import check_world, device_kind, speaks, verify_cases

_HEADERS = [
    "case",
    "out\nerror",
    "worst\ngradient\nerror",
    "of",
    "forward\nbytes\n/formula",
    "backward\nbytes\n/formula",
    "ok",
]

app = typer.Typer(
    help="Exact sequence parallelism for DeepSpeed and Megatron-core.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

cli_plan.register(app)
cli_plans.register(app)
cli_dryrun.register(app)
cli_own_model.register(app)


@app.callback()
def start() -> None:
    """Modules of the folder that a command is started in can be named, as by ``python -m``."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


@app.command()
def doctor(
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks: shows which methods are legal at which sizes.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads of the model.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Key/value heads; as many as query heads if left out.")
    ] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show versions, devices, kernels, and which methods are legal for a model."""
    with user_errors(as_json):
        if (world_size is None) != (heads is None) or (world_size is None and (kv_heads is not None or tp > 1)):
            raise SequenceParallelConfigError(
                setting="--world-size and --heads",
                why="which sizes are legal depends on both",
                remedy="give both, or neither",
            )
        legal = None
        if world_size is not None and heads is not None:
            legal = findings.legality(world_size, heads, kv_heads, tp)
    if as_json:
        found: dict[str, Any] = {
            "software": [asdict(row) for row in findings.software()],
            "devices": findings.devices(),
            "kernels": [asdict(row) for row in findings.kernels()],
        }
        if legal is not None:
            found["methods"] = [{**asdict(row), "legal": row.reason is None} for row in legal]
        print_json(found)
        return
    console = new_console()
    rows = [[row.name, row.version or "not found", row.supported or "", row.note] for row in findings.software()]
    print_table(console, "Software", ["package", "version", "supported", "note"], rows)
    print_table(console, "Devices", ["device"], [[device] for device in findings.devices()])
    rows = [[row.name, "yes" if row.available else "no", row.version or "", row.reason] for row in findings.kernels()]
    print_table(console, "Kernels, in order of preference", ["kernel", "usable", "version", "why"], rows)
    if legal is None:
        console.print(
            "Give --world-size and --heads (and --kv-heads, --tp) to see which methods are legal.", soft_wrap=True
        )
        return
    rows = [[row.method, str(row.size), "no" if row.reason else "yes", row.reason or ""] for row in legal]
    title = f"Methods on {world_size} ranks, tensor parallel {tp}, heads {heads}, kv heads {kv_heads or heads}"
    print_table(console, title, ["method", "size", "legal", "why not"], rows)


@app.command()
def verify(
    method: Annotated[str, typer.Option(help="The method to verify.")],
    size: Annotated[int, typer.Option(min=1, help="Ranks that share one sequence.")],
    heads: Annotated[int | None, typer.Option(min=1, help="Query heads; for lasp, value heads.")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Key/value heads; for lasp, query and key heads.")] = None,
    seq: Annotated[int | None, typer.Option(min=1, help="Length of the whole sequence.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size.")] = None,
    head_dim: Annotated[int | None, typer.Option(min=1, help="Head dim.")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    mask: Annotated[
        str | None,
        typer.Option(
            help="causal, full, window:LEFT[,RIGHT] (RIGHT is 0 if left out), packed:L1,L2,... or several with +."
        ),
    ] = None,
    layout: Annotated[str | None, typer.Option(help=f"One of {', '.join(LAYOUTS)}.")] = None,
    kernel: Annotated[str, typer.Option(help="Local attention kernel; see doctor.")] = "auto",
    decay: Annotated[str | None, typer.Option(help=f"For lasp, one of {', '.join(DECAYS)}.")] = None,
    exchange: Annotated[
        str | None, typer.Option(help=f"For lasp, how states travel: {', '.join(EXCHANGES)} or auto.")
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="For dsp, sizes of the token dims, time first: 5x9 or 5x3x9.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of inputs and weights.")] = 0,
    as_json: AsJson = False,
    timeout: Patience = 600.0,
) -> None:
    """Compare a method with the fp64 oracle and with its byte formula.

    What is not given varies: masks, head counts, layouts, decays and exchanges. Ranks are spawned on this machine;
    under torchrun its world is used. Exit status: 0 all equal, 1 something is not, 2 the request is illegal.
    """
    with user_errors(as_json):
        config = SequenceParallelConfig(method=method, size=size)
        check_world(config)
        fixed = {
            "heads": heads,
            "kv_heads": kv_heads,
            "length": seq,
            "batch": batch,
            "head_dim": head_dim,
            "dtype": DTYPES[one_of("--dtype", dtype, DTYPES)],
            "mask": mask,
            "layout": layout and one_of("--layout", layout, LAYOUTS),
            "kernel": kernel,
            "decay": decay,
            "exchange": exchange,
            "grid": grid and _grid(grid),
            "seed": seed,
        }
        cases = default_cases(method, size, fixed)
        legal = _legal(cases, device_kind(size))
        with rank_failures():
            ran = iter(verify_cases(legal, timeout))
    results = [next(ran) if case in legal else CaseResult(case, refused=refusal(case)) for case in cases]
    failed = any(result.refused is None and not result.ok for result in results)
    if speaks():
        print_json(_verify_json(method, size, results)) if as_json else _show_results(method, size, results)
    raise typer.Exit(FAILED if failed else 0)


def _legal(cases: Sequence[Case], device: str) -> list[Case]:
    """The cases that can run. Where none can, what the user asked for is what is illegal."""
    reasons = {case: refusal(case, device) for case in cases}
    legal = [case for case, reason in reasons.items() if reason is None]
    if not legal:
        raise SequenceParallelConfigError("refused: " + " ".join(dict.fromkeys(r for r in reasons.values() if r)))
    return legal


def _verify_json(method: str, size: int, results: Sequence[CaseResult]) -> dict[str, Any]:
    return {
        "method": method,
        "size": size,
        "ok": all(result.ok or result.refused for result in results),
        "cases": [_case_json(result) for result in results],
    }


def _case_json(result: CaseResult) -> dict[str, Any]:
    case = asdict(result.case)
    case["dtype"] = str(result.case.dtype).removeprefix("torch.")
    return {
        "name": result.case.describe(),
        "case": case,
        "refused": result.refused,
        "ok": result.ok,
        "errors": [{**error._asdict(), "error": _number(error.error), "ok": error.ok} for error in result.errors],
        "wire": [{**check._asdict(), "ok": check.ok} for check in result.wire],
    }


def _number(value: float) -> float | str:
    """JSON has no word for what is not a finite number."""
    return value if math.isfinite(value) else str(value)


def _show_results(method: str, size: int, results: Sequence[CaseResult]) -> None:
    console = new_console()
    ran = [result for result in results if result.refused is None]
    print_table(console, f"{method} on {size} ranks", _HEADERS, [_row(result) for result in ran])
    for result in ran:
        for line in result.failures():
            console.print(f"FAILED {result.case.describe()}: {line}", soft_wrap=True)
    refused = Counter(result.refused for result in results if result.refused is not None)
    for reason, count in refused.items():
        console.print(f"refused, {count} cases: {reason}", soft_wrap=True)
    passed = sum(result.ok for result in ran)
    console.print(f"{passed} of {len(ran)} cases ok. {_judgement(ran[0].case)} Bytes: of all ranks.", soft_wrap=True)


def _judgement(case: Case) -> str:
    limit = TOLERANCES.get(case.dtype)
    if limit is None:
        return (
            f"Errors: root mean square, at most {HALF_PRECISION_FACTOR} times those of the unsharded run, "
            f"or {HALF_PRECISION_FLOOR:.0e}."
        )
    return f"Errors: relative to the oracle's largest value, at most {limit:.0e}."


def _row(result: CaseResult) -> list[str]:
    worst, checks = result.worst_gradient, result.headline
    forward = f"{sum(c.forward for c in checks)}/{sum(c.forward_formula for c in checks)}"
    backward = f"{sum(c.backward for c in checks)}/{sum(c.backward_formula for c in checks)}"
    errors = [f"{result.output.error:.1e}", f"{worst.error:.1e}", worst.name]
    return [result.case.describe(), *errors, forward, backward, "yes" if result.ok else "NO"]


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for plots, logs and TensorBoard files.")] = Path("demo_output"),
    video_steps: Annotated[int, typer.Option(min=3, help="Optimizer steps of the video job.")] = 300,
    text_steps: Annotated[int, typer.Option(min=3, help="Optimizer steps of the GPT job.")] = 30,
) -> None:
    """Train with real DeepSpeed and real Megatron-core, sharded and unsharded, and compare."""
    from dsp_plugin.cli import demo as jobs

    with user_errors():
        ok = jobs.run(output, jobs.Video(video_steps), jobs.Text(text_steps), new_console())
    raise typer.Exit(0 if ok else FAILED)


def _grid(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) < 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise SequenceParallelConfigError(
            setting="--grid", value=text, why="not two or more sizes", remedy="write 5x9 for 5 frames of 9 patches"
        )
    return tuple(map(int, parts))


if __name__ == "__main__":
    app()
