"""The compatibility page: what the tests that carry `cell` marks found, and nothing else.

    python tests/compatibility.py RESULTS.json ... --page docs/compatibility.md

A test marked ``cell(framework, method, feature)`` passes where the combination is exact; with ``status="refused"`` and
a reason, where it is refused. ``pytest --cells-out RESULTS.json`` writes what a run found, with date and versions.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
RESULTS = ROOT / "docs" / "compatibility"
COMMAND = "make matrix"

METHODS = ("dsp", "ulysses", "ring", "usp", "lightseq", "lasp")
CHECKPOINTS = ("checkpoint, other SP size", "checkpoint, other method")
FEATURES = {
    "deepspeed": (
        *(f"ZeRO {stage}" for stage in range(4)),
        *(f"PipelineModule, ZeRO {stage}" for stage in range(3)),
        *(f"AutoTP, ZeRO {stage}" for stage in range(4)),
        "micro-batches > 1",
        "unequal token counts",
        "bf16",
        "recompute",
        "keep_attention",
        *CHECKPOINTS,
        "universal checkpoint",
    ),
    "megatron": (
        "TP",
        "TP-SP",
        "PP",
        "interleaved PP",
        "distributed optimizer",
        "recompute",
        "keep_attention",
        "bf16",
        "micro-batches > 1",
        "unequal token counts",
        "TP2 x SP2 x PP2",
        "SP2 x PP2 x DP2",
        *CHECKPOINTS,
        "checkpoint, other TP, PP, DP",
    ),
}
TITLES = {"deepspeed": "DeepSpeed", "megatron": "Megatron-core"}
# What cannot be asked for at all, with the reason: no test can hold it.
NOT_APPLICABLE = {
    ("deepspeed", "dsp", "keep_attention"): "dsp does not look inside attention, so it has none to keep",
    ("megatron", "dsp", "keep_attention"): "dsp does not look inside attention, so it has none to keep",
    (
        "deepspeed",
        "dsp",
        "unequal token counts",
    ): "a video has no padding; shards are uneven in every cell",
    ("deepspeed", "dsp", "checkpoint, other method"): "a model trained by stages has no other method",
    ("megatron", "dsp", "checkpoint, other method"): "a model trained by stages has no other method",
    ("deepspeed", "lasp", "checkpoint, other method"): "linear layers have one method; its exchanges may change",
    ("megatron", "lasp", "checkpoint, other method"): "linear layers have one method; its exchanges may change",
}
STATUSES = ("exact", "refused")

Key = tuple[str, str, str]


@dataclass
class Cell:
    """A combination, and the tests that hold it.

    Attributes:
        status: what its tests assert: "exact" or "refused".
        outcomes: of its tests, by id: "passed", "failed", "skipped"; empty where they were only collected.
    """

    framework: str
    method: str
    feature: str
    status: str
    reason: str = ""
    tests: list[str] = field(default_factory=list)
    outcomes: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What names it."""
        return self.framework, self.method, self.feature

    def found(self) -> str:
        """Its status where some of its tests ran and none failed; else "failed" or "untested"."""
        outcomes = set(self.outcomes.values())
        if "failed" in outcomes:
            return "failed"
        return self.status if "passed" in outcomes else "untested"


class Recorder:
    """A pytest plugin: the cells of the collected tests, and what became of them."""

    def __init__(self) -> None:
        self.cells: dict[Key, Cell] = {}
        self._of_test: dict[str, list[Cell]] = {}

    def collect(self, items: Iterable[pytest.Item]) -> None:
        """Reads the marks.

        Raises:
            UsageError: a mark names what the page has no place for, or two tests claim different things of a cell.
        """
        for item in items:
            for mark in item.iter_markers("cell"):
                cell = self._cell(item.nodeid, *mark.args, **mark.kwargs)
                cell.tests.append(item.nodeid)
                self._of_test.setdefault(item.nodeid, []).append(cell)

    def _cell(
        self, test: str, framework: str, method: str, feature: str, *, status: str = "exact", reason: str = ""
    ) -> Cell:
        known = method in METHODS and feature in FEATURES.get(framework, ()) and status in STATUSES
        if not known:
            raise pytest.UsageError(f"{test}: no cell ({framework!r}, {method!r}, {feature!r}), status {status!r}")
        cell = self.cells.setdefault((framework, method, feature), Cell(framework, method, feature, status, reason))
        if cell.key in NOT_APPLICABLE or cell.status != status:
            raise pytest.UsageError(f"{test}: says {status} of {cell.key}, which is {cell.status} or not applicable")
        return cell

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the worst outcome of a test's phases."""
        for cell in self._of_test.get(report.nodeid, ()):
            if report.failed:
                cell.outcomes[report.nodeid] = "failed"
            elif report.skipped or report.when == "call":
                cell.outcomes.setdefault(report.nodeid, report.outcome)

    def write(self, path: Path, arguments: Sequence[str]) -> None:
        """Writes cells, date and versions."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "command": f"pytest {' '.join(arguments)}",
            "versions": versions(),
            "cells": [asdict(self.cells[key]) for key in sorted(self.cells)],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


def versions() -> dict[str, str]:
    """Of Python and of what the cells are about."""
    found = {"Python": platform.python_version()}
    for name in ("torch", "megatron-core", "deepspeed", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read(path: Path) -> dict[str, Any]:
    """The results of a run, cells by key."""
    content = json.loads(path.read_text())
    cells = [Cell(**cell) for cell in content["cells"]]
    return {**content, "cells": {cell.key: cell for cell in cells}}


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """The page in Markdown."""
    lines = [
        "# Compatibility",
        "",
        f"Written by `{COMMAND}` from what the tests found; CI fails if it claims more than the suite holds.",
        "",
        "- *exact*: losses of every step and every gradient equal those of an unsharded run (losses to 1e-6, gradients "
        "to 1e-5); bf16 stays within bf16's own noise.",
        "- *refused*: an error that says why, on every rank, before anything is sent.",
        "- *n.a.*: there is nothing to ask for.",
        "",
        "Runs:",
        "",
        *map(_shown_run, runs),
    ]
    notes: dict[str, int] = {}
    for framework, features in FEATURES.items():
        lines += ["", f"## {TITLES[framework]}", "", f"| | {' | '.join(METHODS)} |", f"|---|{'---|' * len(METHODS)}"]
        for feature in features:
            shown = [_shown((framework, method, feature), runs, notes) for method in METHODS]
            lines.append(f"| {feature} | {' | '.join(shown)} |")
    lines += ["", *(f"[{number}] {note}  " for note, number in notes.items())]
    return "\n".join(lines).rstrip() + "\n"


def _shown_run(run: Mapping[str, Any]) -> str:
    found = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return f"- {run['date']}: {found}; {run['command']}"


def _shown(key: Key, runs: Sequence[Mapping[str, Any]], notes: dict[str, int]) -> str:
    """A cell as the page has it, with a footnote where it needs a reason."""
    if key in NOT_APPLICABLE:
        return f"n.a. {_note(NOT_APPLICABLE[key], notes)}"
    cells = {run["versions"]["Python"]: run["cells"][key] for run in runs if key in run["cells"]}
    found = {version: cell.found() for version, cell in cells.items() if cell.found() != "untested"}
    statuses = sorted(set(found.values()))
    if len(statuses) != 1 or statuses[0] not in STATUSES:
        return f"**{', '.join(f'{status} on {version}' for version, status in found.items()) or 'untested'}**"
    why = [cell.reason for cell in cells.values() if cell.reason][:1]
    if len(found) < len(runs):
        why.append(f"tested on Python {', '.join(found)} only")
    return " ".join([statuses[0], *(_note(reason, notes) for reason in why)])


def _note(text: str, notes: dict[str, int]) -> str:
    return f"[{notes.setdefault(text, len(notes) + 1)}]"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="written by pytest --cells-out")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    args.page.write_text(page([read(path) for path in args.results]))
    print(f"{args.page}", file=sys.stderr)


if __name__ == "__main__":
    main()
