"""docs/add-your-model.md, followed: its files are written, its commands run, and what they print is what it shows."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

from dsp_plugin import SequenceParallelConfig
from dsp_plugin.cli import app as cli
from dsp_plugin.plans.plan import resolve_plan

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

PAGE = Path(__file__).parents[3] / "docs" / "add-your-model.md"


class Block(NamedTuple):
    language: str
    text: str


BLOCKS = [Block(*found) for found in re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's Python files, in the folder that commands are started in."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    names = []
    for block in BLOCKS:
        if block.language == "python":
            name = block.text.splitlines()[0].removeprefix("# ")
            (tmp_path / name).write_text(block.text)
            names.append(Path(name).stem)
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


def comparable(text: str) -> list[str]:
    """Lines without errors of rounding in fp64, which differ between machines and on some are none."""

    def unless_rounding(number: re.Match[str]) -> str:
        return "#" if float(number[0]) < 1e-10 else number[0]

    return [re.sub(r"\d\.\de[+-]\d\d+", unless_rounding, line.rstrip()) for line in text.strip().splitlines()]


def commands() -> list[list[str]]:
    """Those that are shown without what they print."""
    return [shlex.split(line) for line in PAGE.read_text().splitlines() if line.startswith("    torchrun ")]


def test_the_page_does_what_it_says(folder: Path) -> None:
    statuses = []
    for block in BLOCKS:
        if block.language == "console":
            command, shown = block.text.removeprefix("$ ").split("\n", 1)
            program, *arguments = shlex.split(command)
            assert program == "dsp-plugin"
            ran = CliRunner().invoke(cli.app, arguments)
            assert comparable(ran.stdout) == comparable(shown), ran.output
            statuses.append(ran.exit_code)
    assert statuses == [1, 0]
    (train,) = commands()
    ran = [sys.executable, "-m", "torch.distributed.run", "--standalone", *train[1:]]
    subprocess.run(ran, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240.0, check=True)


@pytest.mark.parametrize("error", ["1.0e-03", "9.9e-09", "1.0e+00", "inf", "nan"])
def test_an_error_beyond_rounding_is_not_what_the_page_shows(error: str) -> None:
    shown = "largest errors: output 0.0e+00, gradients 1.7e-14; at most 1e-05"
    assert comparable(shown.replace("0.0e+00", "2.8e-16")) == comparable(shown)
    for rounding in ("0.0e+00", "1.7e-14"):
        assert comparable(shown.replace(rounding, error)) != comparable(shown)


def test_the_section_of_the_configuration_is_a_valid_one_and_leads_to_the_plan(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    (section,) = [json.loads(block.text)["sequence_parallel"] for block in BLOCKS if block.language == "json"]
    config = SequenceParallelConfig(**section)
    import forecaster
    import forecaster_plan

    module, _ = forecaster.build()
    assert resolve_plan(module, config.plan) == (module, forecaster_plan.plan)
