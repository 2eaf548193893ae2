"""The command `dsp-plugin verify-model`: the user's own model, sharded beside unsharded, in fp64."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from dsp_plugin.cli.output import (
    FAILED,
    REFUSED,
    AsJson,
    new_console,
    print_json,
    print_table,
    rank_failures,
    user_errors,
)
from dsp_plugin.config.schema import DEEPSPEED_SECTION
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.verification.model import LIMIT
from dsp_plugin.verification.own_model import Report, Request, verify_model


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("verify-model")(verify_model_command)


def verify_model_command(
    model: Annotated[str, typer.Argument(help="Folder of a config.json, or package.module:function.")],
    method: Annotated[str | None, typer.Option(help="The method; ring if left out.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Ranks that share one sequence; 2 if left out.")] = None,
    config: Annotated[
        Path | None, typer.Option(help='DeepSpeed JSON, whose "sequence_parallel" section is taken.')
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that lies beside the config.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds before ranks that hang are given up.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Compare losses and gradients of your model on local ranks with those of the unsharded model.

    Models of Transformers are shrunk to tiny random ones of the same class and tried with packed and padded rows,
    gradient checkpointing and inputs_embeds. Others come with a batch, and the section describes them. Exit status: 0
    exact, 1 something is not, 2 it is refused.
    """
    with user_errors(as_json):
        request = Request(model, _section(config, method, size), trust_remote_code)
        with rank_failures():
            report = verify_model(request, timeout)
    if as_json:
        print_json(_json(model, request, report))
    else:
        _show(request, report)
    first = next(iter(report.verdicts.values())).status
    raise typer.Exit(0 if report.ok else REFUSED if first in ("refused", "not built") else FAILED)


def _section(path: Path | None, method: str | None, size: int | None) -> dict[str, Any]:
    section: dict[str, Any] = {}
    if path is not None:
        try:
            section = dict(json.loads(path.read_text())[DEEPSPEED_SECTION])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SequenceParallelConfigError(
                setting="--config",
                value=str(path),
                why=f"there is no section {DEEPSPEED_SECTION!r} to be read in it: {type(error).__name__} {error}",
                remedy="name a DeepSpeed JSON that has one",
            ) from error
    given = {"method": method, "size": size}
    return {"method": "ring", "size": 2, **section} | {key: value for key, value in given.items() if value is not None}


def _json(model: str, request: Request, report: Report) -> dict[str, Any]:
    return {
        "model": model,
        "class": report.kind,
        "section": dict(request.section),
        "ok": report.ok,
        "shrunk": {name: [str(value) for value in pair] for name, pair in report.shrunk.items()},
        "verdicts": {name: asdict(verdict) for name, verdict in report.verdicts.items()},
    }


def _show(request: Request, report: Report) -> None:
    console, config = new_console(), request.config
    if report.shrunk:
        rows = [[name, *map(str, pair)] for name, pair in report.shrunk.items()]
        print_table(console, f"{report.kind}, random and tiny", ["setting", "yours", "here"], rows)
    rows = [
        [feature, v.status, f"{v.loss:.1e}", f"{v.gradient:.1e}", v.worst, v.first or v.why]
        for feature, v in report.verdicts.items()
    ]
    headers = ["case", "status", "loss\nerror", "worst\ngradient\nerror", "of", "why"]
    print_table(console, f"{report.kind}: {config.method} on {config.size} ranks beside one, in fp64", headers, rows)
    if any(verdict.evaluated for verdict in report.verdicts.values()):
        console.print("Compared in evaluation mode: in training mode the model draws random numbers.", soft_wrap=True)
    console.print(f"Errors: relative to the unsharded model's, at most {LIMIT:.0e}.", soft_wrap=True)
