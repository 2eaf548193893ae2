"""The command `dsp-plugin plan-stages`: the stage table of a model, and whether its plan is right."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import torch
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
from dsp_plugin.config.checks import PLANNED
from dsp_plugin.rehearsal.plan_check import PlanCheck
from dsp_plugin.rehearsal.stage_table import StageTable, stage_table
from dsp_plugin.rehearsal.subject import KNOWN_SUBJECTS, Setting, parse_settings
from dsp_plugin.rehearsal.validate import validate_subject
from dsp_plugin.verification.cases import DTYPES

_HEADERS = ["stage", "count", "sharded", "before", "inside", "forward\nbytes", "backward\nbytes", "instead"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(name="plan-stages")(plan_stages)


def plan_stages(
    model: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(KNOWN_SUBJECTS)}, or package.module:function that returns a module and the arguments of "
            "its forward as a dict."
        ),
    ],
    size: Annotated[int, typer.Option(min=1, help="Ranks that share one sequence.")],
    plan: Annotated[
        str | None, typer.Option(help="package.module:name of the plan; the one known for the model if left out.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Argument of the model's function.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"One of {', '.join(PLANNED)}.")] = "dsp",
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "float32",
    every: Annotated[bool, typer.Option("--all", help="A row for every stage, not one for each kind.")] = False,
    validate: Annotated[
        bool, typer.Option("--validate", help="Run the model whole and sharded, and name the first stage that differs.")
    ] = False,
    small: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="As --set, for --validate only, which needs memory for the model."),
    ] = None,
    as_json: AsJson = False,
    timeout: Patience = 120.0,
) -> None:
    """Show which dim of a model is sharded in which stage, what it costs, and what it beat.

    Nothing is computed for the table, so models of any size can be planned. --validate runs in double precision on
    ranks that are started on this machine. Exit status: 0 all is well, 1 the plan is wrong for the model, 2 the request
    is illegal.
    """
    table: StageTable | None = None
    check: PlanCheck | None = None
    with user_errors(as_json):
        one_of("--method", method, PLANNED)
        element = DTYPES[one_of("--dtype", dtype, DTYPES)]
        of_table = parse_settings(settings or [])
        if validate:
            check = _validate(model, {**of_table, **parse_settings(small or [])}, plan, size, method, timeout)
        if check is None or check.ok:
            table = stage_table(model, of_table, plan, size, method, element)
    if as_json:
        print_json(_json(model, size, method, element, table, check, every))
    else:
        _show(
            f"Stages of {model} on {size} ranks, {method}, {str(element).removeprefix('torch.')}", table, check, every
        )
    raise typer.Exit(FAILED if check is not None and not check.ok else 0)


def _validate(
    model: str, settings: dict[str, Setting], plan: str | None, size: int, method: str, timeout: float
) -> PlanCheck:
    with rank_failures():
        return validate_subject(model, settings, plan, size, method, dtype=torch.float64, timeout=timeout)


def _show(title: str, table: StageTable | None, check: PlanCheck | None, every: bool) -> None:
    console = new_console()
    if table is not None:
        rows = [
            [
                row.stage,
                str(row.count),
                row.sharded,
                row.move,
                row.inside,
                f"{row.wire.forward:,}",
                f"{row.wire.backward:,}",
                row.instead,
            ]
            for row in table.rows(every)
        ]
        for name, wire in (("at the entry", table.plan.enter), ("at the exit", table.plan.leave)):
            if wire.forward or wire.backward:
                rows.append([name, "1", "", "", "", f"{wire.forward:,}", f"{wire.backward:,}", ""])
        print_table(console, title, _HEADERS, rows)
        console.print(
            "Bytes of a row leave the busiest rank in one stage; those below leave all ranks.", soft_wrap=True
        )
        for line in _totals(table):
            console.print(line, soft_wrap=True)
    if check is not None:
        for line in _verdict(check):
            console.print(line, soft_wrap=True)


def _totals(table: StageTable) -> list[str]:
    (method, total), *others = table.totals.items()
    lines = [f"{method}: {total:,} bytes, forward and backward."]
    for other, cost in others:
        if isinstance(cost, str):
            lines.append(f"{other}: impossible. {cost}")
        else:
            assert isinstance(total, int)
            ratio = f", {cost / total:.2f} times as many" if total else ""
            lines.append(f"{_NAMES[other]}: {cost:,} bytes{ratio}.")
    return lines


_NAMES = {"dsp": "dsp", "ulysses": "ulysses, one dim sharded throughout"}


def _verdict(check: PlanCheck) -> list[str]:
    if check.fault is not None:
        return [f"The plan is wrong for the model. First difference {check.fault}"]
    gradient = f"gradients {check.gradient[1]:.1e}" if check.gradient is not None else "no gradients"
    return [
        f"The plan is right for the model: {len(check.stages)} stages, output and gradients are those of the unsharded "
        f"model (largest errors: output {check.output:.1e}, {gradient}; at most {check.tolerance:.0e}).",
        f"It sent {check.sent:,} bytes, and the stage table has {check.planned:,}.",
    ]


def _json(
    model: str,
    size: int,
    method: str,
    dtype: torch.dtype,
    table: StageTable | None,
    check: PlanCheck | None,
    every: bool,
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model": model,
        "size": size,
        "method": method,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if table is not None:
        found |= {
            "stages": [{**asdict(row), "wire": row.wire._asdict()} for row in table.rows(every)],
            "enter": table.plan.enter._asdict(),
            "leave": table.plan.leave._asdict(),
            "total": table.plan.total,
            "totals": dict(table.totals),
        }
    if check is not None:
        found["check"] = {**_finite(asdict(check)), "ok": check.ok}
    return found


def _finite(value: Any) -> Any:
    """JSON has no word for infinity."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_finite(item) for item in value]
    return str(value) if value in (float("inf"), float("-inf")) else value
