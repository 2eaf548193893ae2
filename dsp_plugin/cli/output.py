"""How commands print: tables that read well on a terminal and in a file, JSON, and users' errors as one line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dsp_plugin.comm.agreement import LONGEST_TIMEOUT
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.spawn import RankFailure
from dsp_plugin.verification.world import speaks

FAILED, REFUSED = 1, 2
# Headers of the columns that hold prose, which may wrap.
_PROSE = ("case", "of", "note", "why", "why not", "device", "instead")
_PROSE_WIDTH = 10

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def _counted(seconds: float) -> float:
    # Not a number is neither below the least nor above the most.
    if math.isnan(seconds):
        raise typer.BadParameter("not a number of seconds")
    return seconds


Patience = Annotated[
    float,
    typer.Option(
        "--timeout",
        min=1.0,
        max=LONGEST_TIMEOUT,
        callback=_counted,
        help="Seconds before ranks that hang are given up.",
    ),
]


@contextmanager
def user_errors(as_json: bool = False) -> Iterator[None]:
    """What the user got wrong is one line and exit status 2, not a traceback."""
    try:
        yield
    except (SequenceParallelConfigError, UnsupportedError) as error:
        if speaks():
            typer.echo(f"error: {error}", err=True)
            if as_json:
                print_json({"ok": False, "error": str(error)})
        raise typer.Exit(REFUSED) from None


@contextmanager
def rank_failures() -> Iterator[None]:
    """What the user got wrong is raised as it is; ranks that died or hung are shown, with exit status 1."""
    try:
        yield
    except RankFailure as failure:
        for error in failure.errors.values():
            if isinstance(error, SequenceParallelConfigError | UnsupportedError):
                raise error from None
        typer.echo(str(failure), err=True)
        raise typer.Exit(FAILED) from None


def one_of(option: str, value: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The value of an option that takes one of a few.

    Raises:
        SequenceParallelConfigError: it is none of them; the nearest is named.
    """
    if value in known:
        return value
    nearest = get_close_matches(value, list(known), n=1)
    raise SequenceParallelConfigError(
        setting=option,
        value=value,
        why="unknown" + (f", the nearest is {nearest[0]!r}" if nearest else ""),
        remedy=f"use one of {', '.join(known)}",
    )


def new_console() -> Console:
    """Plain text as wide as it needs to be when not on a terminal."""
    if sys.stdout.isatty():
        return Console(highlight=False, markup=False)
    return Console(highlight=False, markup=False, force_terminal=False, color_system=None, width=10_000)


def print_table(console: Console, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prose and headers may wrap on a narrow terminal, numbers never do."""
    table, needed = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0)), 0
    for header, *cells in zip(headers, *rows, strict=True):
        prose = header in _PROSE
        table.add_column(header, no_wrap=not prose, overflow="fold")
        needed += 2 + (_PROSE_WIDTH if prose else max(map(len, [*cells, *header.split("\n")])))
    console.width = max(console.width, needed)
    for row in rows:
        table.add_row(*row)
    console.print(title, style="bold")
    if console.is_terminal:
        console.print(table)
    else:
        with console.capture() as text:
            console.print(table)
        typer.echo("\n".join(line.rstrip() for line in text.get().splitlines()))
    console.print()


def print_json(value: Any) -> None:
    """JSON on stdout."""
    typer.echo(json.dumps(value, indent=2))
