"""docs/compatibility.md claims what the suite holds, and no more."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from compatibility import FEATURES, METHODS, NOT_APPLICABLE, PAGE, RESULTS, ROOT, Cell, page, read


def results() -> list[Path]:
    return sorted(RESULTS.glob("*.json"))


def test_the_page_is_what_the_results_say() -> None:
    assert len(results()) == 2, "make matrix writes one file for each environment"
    assert PAGE.read_text() == page([read(path) for path in results()])


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The cells that tests of this tree hold, run or not."""
    path = tmp_path_factory.mktemp("cells") / "cells.json"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/integration", "--cells-out", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return read(path)["cells"]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("path", results(), ids=lambda path: path.stem)
def test_every_claim_has_a_test_that_says_the_same(path: Path, held: dict) -> None:
    for key, cell in read(path)["cells"].items():
        if cell.found() == "untested":
            continue
        assert key in held, f"{key} is claimed {cell.found()}, and no test holds it any more"
        now = held[key]
        assert cell.found() == now.status, f"{key} is claimed {cell.found()}, its tests say {now.status}"
        assert set(cell.tests) <= set(now.tests), f"{key}: tests are gone: {set(cell.tests) - set(now.tests)}"


def test_no_cell_failed_or_is_untested() -> None:
    runs = [read(path)["cells"] for path in results()]
    for framework, features in FEATURES.items():
        for method in METHODS:
            for feature in features:
                key = framework, method, feature
                found = {run[key].found() for run in runs if key in run} - {"untested"}
                assert key in NOT_APPLICABLE or found in ({"exact"}, {"refused"}), f"{key}: {found or 'untested'}"


def test_a_cell_is_exact_only_where_its_tests_passed() -> None:
    cell = Cell("megatron", "ring", "TP", "exact")
    assert cell.found() == "untested"
    cell.outcomes = {"a": "skipped"}
    assert cell.found() == "untested"
    cell.outcomes = {"a": "skipped", "b": "passed"}
    assert cell.found() == "exact"
    cell.outcomes = {"a": "passed", "b": "failed"}
    assert cell.found() == "failed"


@pytest.mark.parametrize(
    ("outcomes", "shown"),
    [
        (("passed", "passed"), "exact"),
        (("passed", None), r"exact \[\d+\]"),
        (("passed", "failed"), re.escape("**exact on 3.11.0, failed on 3.12.0**")),
    ],
)
def test_the_page_shows_what_each_environment_found(outcomes: tuple, shown: str, tmp_path: Path) -> None:
    runs = []
    for version, outcome in zip(("3.11.0", "3.12.0"), outcomes, strict=True):
        cell = {"framework": "megatron", "method": "ring", "feature": "TP", "status": "exact", "reason": ""}
        cells = [{**cell, "tests": ["t"], "outcomes": {"t": outcome} if outcome else {}}]
        path = tmp_path / version
        path.write_text(json.dumps({"date": "d", "command": "c", "versions": {"Python": version}, "cells": cells}))
        runs.append(read(path))
    row = next(line for line in page(runs).splitlines() if line.startswith("| TP |"))
    assert re.fullmatch(shown, row.split("|")[4].strip())
    assert row.split("|")[5].strip() == "**untested**"
