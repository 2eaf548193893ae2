"""``python -m benchmarks``: measure, and write tables and plots."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import (
    attention,
    balance,
    convergence,
    first_pass,
    hot_path,
    length,
    linear_exchange,
    linear_length,
    memory_slopes,
    overlap,
    packed_schedule,
    planner,
    recompute,
    space_time,
    switch_copies,
    switch_overlap,
)
from benchmarks.environment import ROOT, environment
from benchmarks.result import Result, shown, write_report

BENCHMARKS: dict[str, ModuleType] = {
    module.NAME: module
    for module in (
        attention,
        balance,
        recompute,
        overlap,
        linear_length,
        linear_exchange,
        convergence,
        space_time,
        switch_copies,
        switch_overlap,
        first_pass,
        hot_path,
        length,
        memory_slopes,
        planner,
        packed_schedule,
    )
}
_QUIET = 0.5
"""Load average above which something else is likely to be running."""


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that it works; under a minute.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(BENCHMARKS)}; may repeat.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder; benchmarks/results, or build/benchmarks-quick with --quick.")
    ] = None,
) -> None:
    """Measure, and write JSON, Markdown and PNG."""
    unknown = [name for name in only or () if name not in BENCHMARKS]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}", param_hint="--only")
    folder = output or ROOT / ("build/benchmarks-quick" if quick else "benchmarks/results")
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _end)
    console = Console()
    results = _run([name for name in BENCHMARKS if not only or name in only], quick, folder, console)
    console.print(f"written to {write_report(folder, list(BENCHMARKS))}")
    if any(result.failures for result in results):
        raise typer.Exit(1)


def _run(names: list[str], quick: bool, folder: Path, console: Console) -> list[Result]:
    facts = environment(sys.argv[1:])
    console.print(f"{facts['cpu']}; load {facts['load']}")
    if os.getloadavg()[0] > _QUIET:
        console.print("the machine is busy: don't trust the numbers", style="yellow")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    results = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=sum(BENCHMARKS[name].steps(quick) for name in names))
        earlier = itertools.count()

        def show_on_bar(name: str, what: str) -> None:
            progress.update(bar, description=f"{name}: {what}", completed=next(earlier))

        for name in names:
            started = time.monotonic()
            result = _guarded(BENCHMARKS[name], quick, partial(show_on_bar, name))
            result.environment = {**facts, "took": f"{time.monotonic() - started:.0f} s"}
            results.append(result)
            _keep(BENCHMARKS[name], result, folder)
            _show(result, progress.console)
        progress.update(bar, description="done", completed=next(earlier))
    return results


def _guarded(benchmark: ModuleType, quick: bool, advance: Callable[[str], None]) -> Result:
    """One benchmark's defect must not take the others' results along."""
    try:
        return benchmark.run(quick, advance)
    except Exception:
        return Result(benchmark.NAME, benchmark.NAME, {}, {}, [], failures=[traceback.format_exc()])


def _keep(benchmark: ModuleType, result: Result, folder: Path) -> None:
    picture = folder / f"{result.name}.png"
    # One of an earlier run would not belong to these numbers.
    picture.unlink(missing_ok=True)
    if result.rows and not result.failures:
        benchmark.draw(result, picture)
    result.write(folder)


def _show(result: Result, console: Console) -> None:
    if result.skipped:
        console.print(f"{result.name} skipped: {result.skipped}")
    if result.rows:
        table = Table(title=result.title)
        for key in result.brief:
            table.add_column(result.columns[key])
        for row in result.rows:
            table.add_row(*(shown(row.get(key)) for key in result.brief))
        console.print(table)
    for failure in result.failures:
        console.print(f"{result.name} failed: {failure}", style="red", markup=False)


def _end(_signal: int, _frame: FrameType | None) -> None:
    """So that what is open is closed: ranks, namespaces."""
    sys.exit(143)


if __name__ == "__main__":
    typer.run(main)
