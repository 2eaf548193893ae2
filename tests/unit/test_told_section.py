"""The section that a run is told: how the launcher reads it, beside what it is refused, and a run that ignores it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsp_plugin.launch.__main__ import Command

SECTION = '{"method": "ring", "size": 2}'


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.touch()
    return str(path)


def test_a_section_is_read_from_a_file_or_the_command_line(script: str, tmp_path: Path) -> None:
    (tmp_path / "section.json").write_text(SECTION)
    for given in (["--sequence-parallel", str(tmp_path / "section.json")], [f"--sequence-parallel={SECTION}"]):
        assert Command.parse([*given, script, "--sequence-parallel"]).section == SECTION


@pytest.mark.parametrize(
    ("variable", "option", "after", "words"),
    [
        (None, SECTION, ["--sp-method", "ring"], ["--sp-method='ring'", "--sequence-parallel", "drop"]),
        (SECTION, None, ["--sp-method", "ring"], ["--sp-method='ring'", "DSP_PLUGIN_SECTION"]),
        (SECTION, '{"method": "ulysses", "size": 2}', [], ["another section", "Unset DSP_PLUGIN_SECTION"]),
        ('{"method": "rings", "size": 2}', None, [], ["DSP_PLUGIN_SECTION", "'rings'"]),
    ],
)
def test_a_section_beside_another_is_refused(
    variable: str | None, option: str | None, after: list[str], words: list[str], script: str, tmp_path: Path
) -> None:
    done = launch_told(variable, option, script, *after, cwd=tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    assert all(word in done.stderr.splitlines()[-1] for word in words), done.stderr


@pytest.mark.parametrize("end", ["", pytest.param("raise SystemExit(0)", marks=pytest.mark.matrix)])
@pytest.mark.parametrize(
    ("variable", "option"),
    [(None, SECTION), (SECTION, None), pytest.param(SECTION, SECTION, marks=pytest.mark.matrix)],
)
def test_a_section_that_nothing_used_fails_the_run(
    variable: str | None, option: str | None, end: str, tmp_path: Path
) -> None:
    (tmp_path / "trains.py").write_text(f"print('trained')\n{end}\n")
    done = launch_told(variable, option, str(tmp_path / "trains.py"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "trained\n")
    assert done.stderr.count("no model was sharded") == 1


def test_a_section_that_nothing_used_is_told_without_the_launcher(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import dsp_plugin"],
        env={**os.environ, "DSP_PLUGIN_SECTION": SECTION},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr.count("no model was sharded") == 1


def test_a_script_that_fails_keeps_its_status_under_a_section(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("raise SystemExit(7)\n")
    done = launch_told(None, SECTION, str(tmp_path / "fails.py"), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (7, "")


def launch_told(variable: str | None, option: str | None, *argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the launcher, with a section in the environment and as an option."""
    kept = {name: value for name, value in os.environ.items() if name not in ("DSP_PLUGIN_CPU", "RANK")}
    return subprocess.run(
        [
            *(sys.executable, "-m", "dsp_plugin.launch"),
            *([] if option is None else ["--sequence-parallel", option]),
            *argv,
        ],
        cwd=cwd,
        env={**kept, **({} if variable is None else {"DSP_PLUGIN_SECTION": variable})},
        capture_output=True,
        text=True,
        timeout=120,
    )
