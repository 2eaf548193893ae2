"""What a benchmark hands back, and how it becomes JSON and Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass
class Result:
    """The outcome of one benchmark.

    Attributes:
        name: of the benchmark and its files.
        title: heading in the report.
        settings: sizes and other choices that hold for all rows.
        columns: heading in the report by key of a row; other keys are in the JSON only.
        brief: the keys of the columns that the terminal shows.
        rows: one measurement each.
        notes: sentences that a reader of the table needs.
        failures: what went wrong, one message each.
        skipped: why nothing was measured; empty if something was.
        environment: as from `environment.environment`.
    """

    name: str
    title: str
    settings: dict[str, Any]
    columns: dict[str, str]
    brief: list[str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """To ``<name>.json`` in ``folder``."""
        (folder / f"{self.name}.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Result:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text()))

    def markdown(self, picture: bool) -> str:
        """A section of the report."""
        lines = [f"## {self.title}", ""]
        if self.skipped:
            return "\n".join([*lines, f"Skipped: {self.skipped}", ""])
        lines += [f"![{self.title}]({self.name}.png)", ""] if picture else []
        lines += [f"| {' | '.join(self.columns.values())} |", f"|{'---|' * len(self.columns)}"]
        lines += [f"| {' | '.join(shown(row.get(key)) for key in self.columns)} |" for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)]
        for failure in self.failures:
            # Where, and in the last line of a traceback what.
            where, *traceback = failure.strip().splitlines()
            lines.append(f"- **Failed:** {' '.join([where, *traceback[-1:]])}")
        facts = {**self.settings, **self.environment}
        lines += ["", *(f"- {name}: {shown(value)}" for name, value in facts.items()), ""]
        return "\n".join(lines)


def shown(value: Any) -> str:
    """A value as tables show it: floats to three figures, lists with commas."""
    if value is None:
        return ""
    if isinstance(value, float):
        if value == 0:
            return "0"
        return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 100_000 else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return str(value)


def write_report(folder: Path, order: list[str]) -> Path:
    """``README.md`` over all results in ``folder``, also those of earlier runs, each with its own circumstances."""
    sections = [
        Result.read(folder / f"{name}.json").markdown(picture=(folder / f"{name}.png").exists())
        for name in order
        if (folder / f"{name}.json").exists()
    ]
    heading = (
        "# Benchmark results\n\nWritten by `make bench`. Read ratios, not seconds: what a ratio compares was measured "
        "in one run, in turns. Samples are in the JSON files beside this one.\n"
    )
    path = folder / "README.md"
    path.write_text("\n".join([heading, *sections]))
    return path
