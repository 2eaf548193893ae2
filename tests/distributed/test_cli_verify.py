"""`dsp-plugin verify` as a user runs it: on ranks it spawns, and on those of torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(150)]

CLI = ["-m", "dsp_plugin.cli.app", "verify"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, env=environment, check=False
    )


def test_a_pass_is_status_0_and_plain_text() -> None:
    done = run(*CLI, "--method", "ulysses", "--size", "2", "--seq", "13", "--mask", "causal+window:4", "--heads", "3")
    assert done.returncode == 0, done.stderr
    assert "6 of 6 cases ok" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def test_a_refusal_is_status_2_and_one_line() -> None:
    done = run(*CLI, "--method", "ulysses", "--size", "3", "--heads", "2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: refused: heads=2 < ulysses_size=3")
    assert len(done.stderr.splitlines()) == 1


def test_lasp_with_a_decay_and_an_exchange() -> None:
    asked = ("--method", "lasp", "--size", "3", "--decay", "gated-delta", "--exchange", "scan")
    done = run(*CLI, *asked, "--mask", "causal+packed:7,1,10", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is True
    for case in answer["cases"]:
        assert {error["name"] for error in case["errors"]} >= {"out", "dq", "dk", "dv", "dbeta", "dg"}
        assert [check["forward"] for check in case["wire"]] == [check["forward_formula"] for check in case["wire"]]


WRONG = """
from dataclasses import replace
from dsp_plugin.cli.app import app
from dsp_plugin.methods import METHODS

true = METHODS["ulysses"]

def attention(*args, where, **settings):
    out, groups = true.attention(*args, where=where, **settings), where.groups
    {flaw}
    return out

# Ranks import this file too.
METHODS["ulysses"] = replace(true, attention=attention)

if __name__ == "__main__":
    app()
"""


def broken(tmp_path: Path, flaw: str) -> str:
    script = tmp_path / "broken.py"
    script.write_text(WRONG.format(flaw=flaw))
    return str(script)


def test_a_wrong_gradient_is_status_1(tmp_path: Path) -> None:
    script = broken(tmp_path, "out = out.detach() + 0.999 * (out - out.detach()) if groups.sp.rank else out")
    done = run(script, *CLI[2:], "--method", "ulysses", "--size", "2", "--mask", "full", "--heads", "2", "--json")
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is False
    for case in answer["cases"]:
        assert {error["name"]: error["ok"] for error in case["errors"]} == {
            "out": True,
            "dq": False,
            "dk": False,
            "dv": False,
        }
        assert all(check["ok"] for check in case["wire"])


def test_a_rank_that_hangs_is_shown_and_given_up(tmp_path: Path) -> None:
    script = broken(tmp_path, "__import__('time').sleep(100 * groups.sp.rank)")
    done = run(
        script, *CLI[2:], "--method", "ulysses", "--size", "2", "--mask", "full", "--heads", "2", "--timeout", "8"
    )
    assert done.returncode == 1
    assert "rank 1 still running, limit 8 s" in done.stderr
    assert "in attention" in done.stderr


def test_the_world_of_torchrun_is_used() -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    done = run(*torchrun, *CLI, "--method", "dsp", "--size", "2", "--mask", "causal", "--heads", "2", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is True
    # Two sequence groups of two: every rank of the world reports.
    assert all(len(case["wire"]) % 4 == 0 for case in answer["cases"])
