"""What the command line says, and how it ends, without spawning a rank."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from dsp_plugin import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.cli import app as cli
from dsp_plugin.cli import demo, doctor
from dsp_plugin.spawn import RankFailure
from dsp_plugin.verification import Case, CaseResult, TensorError, WireCheck

pytestmark = pytest.mark.timeout(60)

ESCAPE = "\x1b"


@pytest.fixture(autouse=True)
def _no_launched_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def test_help_names_every_command() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    assert all(command in shown.stdout for command in ("doctor", "verify", "plan-stages", "demo"))


def test_doctor_shows_versions_devices_and_kernels_as_plain_text() -> None:
    shown = run("doctor")
    assert shown.exit_code == 0, shown.output
    assert ESCAPE not in shown.stdout
    names = ("torch", "gloo", "deepspeed", "megatron-core", "apex (NVIDIA)", "transformer-engine", "NCCL")
    for name in (*names, "flash-linear-attention", "triton"):
        assert f"\n{name}" in shown.stdout
    kernels = shown.stdout.split("Kernels")[1]
    assert "cpu_flash   yes" in kernels
    if not torch.cuda.is_available():
        assert "fa3         no" in kernels
        assert "no cuda device" in kernels


def test_doctor_json_is_all_that_it_prints() -> None:
    found = json.loads(run("doctor", "--json", "--world-size", "4", "--heads", "4").stdout)
    assert {row["name"]: row["version"] for row in found["software"]}["torch"] == torch.__version__
    assert [row["name"] for row in found["kernels"]][-3:] == ["reference", "fla", "chunked"]
    assert {(row["method"], row["size"], row["legal"]) for row in found["methods"]} >= {("ulysses", 4, True)}


@pytest.mark.parametrize("unusable", ["package fla-core is not installed", None])
def test_doctor_says_which_kernel_linear_attention_uses_and_why(
    monkeypatch: pytest.MonkeyPatch, unusable: str | None
) -> None:
    monkeypatch.setattr(doctor.linear_fla, "unusable", lambda *tensors: unusable)
    rows = {row.name: row for row in doctor.kernels()}
    assert rows["fla"].available == (unusable is None)
    assert (unusable or "are installed") in rows["fla"].reason
    assert rows["chunked"].available
    assert ("all of it here" in rows["chunked"].reason) == (unusable is not None)


@pytest.mark.parametrize(
    ("model", "legal"),
    [
        (("--world-size", "8", "--heads", "6", "--kv-heads", "2"), {"ulysses": {1, 2, 4}, "dsp": {1, 2, 4, 8}}),
        (("--world-size", "8", "--heads", "6", "--kv-heads", "2", "--tp", "2"), {"ulysses": {1, 2}, "dsp": {1, 2, 4}}),
        (("--world-size", "6", "--heads", "12"), {"ulysses": {1, 2, 3, 6}, "dsp": {1, 2, 3, 6}}),
    ],
)
def test_doctor_says_which_sizes_are_legal_and_why_others_are_not(
    model: Sequence[str], legal: dict[str, set[int]]
) -> None:
    rows = json.loads(run("doctor", "--json", *model).stdout)["methods"]
    for method, sizes in legal.items():
        assert {row["size"] for row in rows if row["method"] == method and row["legal"]} == sizes
    for row in rows:
        assert row["legal"] == (row["reason"] is None)
        if row["method"] == "ulysses" and not row["legal"]:
            assert f"< ulysses_size={row['size']}" in row["reason"]
    assert run("doctor", *model).stdout.count("  yes") >= sum(map(len, legal.values()))


def test_doctor_imports_no_upstream_package() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from dsp_plugin.cli.app import app;"
        "assert CliRunner().invoke(app, ['doctor', '--world-size', '2', '--heads', '2']).exit_code == 0;"
        "names = 'deepspeed', 'megatron', 'flash_attn', 'fla', 'apex', 'transformer_engine';"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("folders", "version", "note"),
    [
        (["models"], None, "another project"),
        (["optimizers"], "unknown version", ""),
        (["multi_tensor_apply", "transformer"], "unknown version", ""),
    ],
)
def test_nvidia_apex_is_told_from_the_other_apex_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: list[str], version: str | None, note: str
) -> None:
    for folder in folders:
        (tmp_path / "apex" / folder).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    row = next(row for row in doctor.software() if row.name.startswith("apex"))
    assert row.version == version
    assert note in row.note
    assert bool(note) == bool(row.note)


def test_supported_versions_are_those_of_our_own_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["torch>=2.6", 'megatron-core<0.20,>=0.16.1; extra == "megatron"', 'deepspeed>=9; extra == "deepspeed"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: asked)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.17.0")
    rows = {row.name: row for row in doctor.software()}
    assert rows["megatron-core"].supported == "<0.20,>=0.16.1"
    assert rows["megatron-core"].note == ""
    assert rows["deepspeed"].note == "not supported: install deepspeed>=9"


DSP, ULYSSES, LASP = (("verify", "--method", method) for method in ("dsp", "ulysses", "lasp"))
MISTAKES: list[tuple[tuple[str, ...], str]] = [
    (("verify", "--method", "ulises", "--size", "2"), "'ulysses'"),
    ((*ULYSSES, "--size", "8", "--heads", "6"), "heads=6 < ulysses_size=8"),
    ((*ULYSSES, "--size", "64"), "heads=8 < ulysses_size=64"),
    ((*ULYSSES, "--size", "2", "--heads", "6", "--kv-heads", "4"), "heads=6 is not a multiple of kv_heads=4"),
    ((*ULYSSES, "--size", "2", "--dtype", "float23"), "the nearest is 'float32'"),
    ((*ULYSSES, "--size", "2", "--layout", "zigzig"), "the nearest is 'zigzag'"),
    ((*ULYSSES, "--size", "2", "--kernel", "cpu_flush"), "did you mean 'cpu_flash'"),
    ((*ULYSSES, "--size", "2", "--kernel", "fa3"), "fa3 cannot serve this"),
    ((*ULYSSES, "--size", "2", "--mask", "casual"), "'casual' is not one of causal"),
    ((*ULYSSES, "--size", "2", "--mask", "causal:3"), "'causal:3' is not one of causal"),
    ((*ULYSSES, "--size", "2", "--mask", "causal+full"), "contradicts"),
    ((*ULYSSES, "--size", "2", "--mask", "window:1,2,3"), "not 3 numbers"),
    ((*ULYSSES, "--size", "2", "--mask", "window:-1"), "'-1' is not a list of counts"),
    ((*ULYSSES, "--size", "2", "--mask", "packed:5,x"), "'5,x' is not a list of counts"),
    ((*ULYSSES, "--size", "2", "--mask", "packed:5,9", "--seq", "15"), "5 + 9 = 14 tokens do not fill the 15"),
    ((*ULYSSES, "--size", "2", "--grid", "3x4"), "shards one sequence dim"),
    ((*DSP, "--size", "2", "--layout", "zigzag"), "method dsp takes contiguous"),
    ((*DSP, "--size", "2", "--grid", "3x4", "--seq", "13"), "3 * 4 = 12 tokens, but the sequence length is 13"),
    ((*DSP, "--size", "2", "--grid", "12"), "write 5x9"),
    ((*DSP, "--size", "2", "--grid", "3x0"), "write 5x9"),
    ((*LASP, "--size", "2", "--decay", "gate-delta"), "the nearest is 'gated-delta'"),
    ((*LASP, "--size", "2", "--exchange", "all_gather"), "the nearest is 'allgather'"),
    ((*LASP, "--size", "2", "--decay", "delta", "--mask", "full"), "only causal attention has them"),
    ((*LASP, "--size", "2", "--mask", "causal+window:4"), "linear attention has no window"),
    ((*LASP, "--size", "2", "--mask", "packed:5,9", "--seq", "15"), "5 + 9 = 14 tokens do not fill the 15"),
    ((*LASP, "--size", "2", "--kernel", "chunk"), "the nearest is 'chunked'"),
    ((*LASP, "--size", "2", "--kernel", "fla"), "kernel='fla'"),
    ((*LASP, "--size", "2", "--heads", "6", "--kv-heads", "4"), "heads=6 is not a multiple of kv_heads=4"),
    ((*LASP, "--size", "2", "--grid", "3x4"), "shards one sequence dim"),
    ((*LASP, "--size", "2", "--layout", "striped"), "method lasp takes contiguous, zigzag"),
    ((*ULYSSES, "--size", "2", "--decay", "delta"), "decay='delta': method ulysses has no state that could decay"),
    ((*DSP, "--size", "2", "--exchange", "ring"), "exchange='ring': method dsp has no state that could decay"),
    (("doctor", "--world-size", "8"), "give both, or neither"),
    (("doctor", "--tp", "2"), "give both, or neither"),
    (("doctor", "--world-size", "8", "--heads", "6", "--tp", "3"), "8 ranks does not split into groups of 3"),
    (("doctor", "--world-size", "8", "--heads", "6", "--tp", "4"), "6 query heads do not split over 4"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda value: " ".join(value[1:]) if value else "")
def test_mistakes_are_one_clear_line_and_status_2(arguments: Sequence[str], words: str) -> None:
    shown = run(*arguments)
    assert shown.exit_code == 2
    assert words.lower() in shown.stderr.lower()
    assert len(shown.stderr.strip().splitlines()) == 1
    assert shown.stdout == ""


@pytest.mark.parametrize("arguments", [("verify", "--size", "2"), (*ULYSSES, "--size", "0"), (*ULYSSES, "--tensor")])
def test_usage_errors_are_status_2_without_a_traceback(arguments: Sequence[str]) -> None:
    shown = run(*arguments)
    assert shown.exit_code == 2
    assert "Error" in shown.stderr
    assert "Traceback" not in shown.output


def test_json_mistakes_are_json_too() -> None:
    shown = run(*ULYSSES, "--size", "8", "--heads", "6", "--json")
    assert shown.exit_code == 2
    answer = json.loads(shown.stdout)
    assert answer["ok"] is False
    assert "heads=6 < ulysses_size=8" in answer["error"]


def test_a_size_that_does_not_divide_the_launched_world_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    shown = run(*DSP, "--size", "3")
    assert shown.exit_code == 2
    assert "does not divide the 4 ranks" in shown.stderr
    monkeypatch.setenv("RANK", "1")
    shown = run(*DSP, "--size", "3")
    assert (shown.exit_code, shown.output) == (2, "")


def result(case: Case, error: float = 1e-7, forward: int = 10, formula: int = 10) -> CaseResult:
    errors = (TensorError("out", 1e-8, 1e-5), TensorError("dq", error, 1e-5), TensorError("dk", 2e-8, 1e-5))
    wire = tuple(WireCheck("one attention call", rank, forward, formula, 7, 7) for rank in range(case.size))
    return CaseResult(case, errors, wire)


def answer_with(monkeypatch: pytest.MonkeyPatch, **flaw: Any) -> None:
    """Every case gives the same answer."""
    monkeypatch.setattr(cli, "verify_cases", lambda cases, timeout: [result(case, **flaw) for case in cases])


BIG = 123_456_789_012


def test_a_pass_is_a_plain_table_that_splits_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    answer_with(monkeypatch, forward=BIG, formula=BIG)
    shown = run(*ULYSSES, "--size", "3", "--mask", "causal", "--layout", "zigzag")
    assert shown.exit_code == 0
    assert ESCAPE not in shown.stdout
    assert shown.stdout.count(f"1.0e-08  1.0e-07   dq  {3 * BIG}/{3 * BIG}  21/21") == 3
    assert "3 of 3 cases ok" in shown.stdout
    assert not any(line.endswith(" ") for line in shown.stdout.splitlines())


@pytest.mark.parametrize(("width", "sent"), [(80, 123_456), (120, BIG), (40, BIG)])
def test_a_narrow_terminal_wraps_words_and_no_numbers(monkeypatch: pytest.MonkeyPatch, width: int, sent: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None, markup=False)
    monkeypatch.setattr(cli, "new_console", lambda: console)
    answer_with(monkeypatch, forward=sent, formula=sent)
    assert run(*ULYSSES, "--size", "2", "--mask", "causal", "--layout", "zigzag").exit_code == 0
    shown = screen.getvalue()
    for text in (f" {2 * sent}/{2 * sent} ", " 14/14 ", " 1.0e-08 ", " 1.0e-07 ", " yes"):
        assert shown.count(text) == 3, shown
    fits = all(len(line) <= width for line in shown.splitlines() if "cases ok" not in line)
    assert fits == (width >= 80)


@pytest.mark.parametrize(
    ("flaw", "words"),
    [
        ({"error": 1e-3}, "dq is off by 1.00e-03 of its largest value, limit 1.00e-05"),
        ({"error": math.nan}, "dq is off by nan"),
        (
            {"forward": 14},
            "rank 1 sent 14 bytes forward and 7 backward for one attention call, the formula says 10 and 7",
        ),
    ],
)
def test_a_failure_is_named_and_is_status_1(monkeypatch: pytest.MonkeyPatch, flaw: dict[str, Any], words: str) -> None:
    answer_with(monkeypatch, **flaw)
    shown = run(*ULYSSES, "--size", "2", "--mask", "full")
    assert shown.exit_code == 1
    assert words in shown.stdout
    assert "0 of 9 cases ok" in shown.stdout
    as_json = run(*ULYSSES, "--size", "2", "--mask", "full", "--json")
    assert as_json.exit_code == 1
    answer = json.loads(as_json.stdout, parse_constant=pytest.fail)
    assert answer["ok"] is False
    assert not any(case["ok"] for case in answer["cases"])


def test_cases_nobody_asked_for_are_listed_as_refused_and_fail_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch)
    shown = run(*ULYSSES, "--size", "7", "--mask", "full")
    assert shown.exit_code == 0
    assert "refused, 3 cases: heads=6 < ulysses_size=7" in shown.stdout
    cases = json.loads(run(*ULYSSES, "--size", "7", "--mask", "full", "--json").stdout)["cases"]
    assert sorted(case["case"]["heads"] for case in cases if case["refused"]) == [6, 6, 6]
    assert all(case["ok"] != bool(case["refused"]) for case in cases)


@pytest.mark.parametrize(
    ("errors", "status", "words"),
    [
        ({1: RuntimeError("boom")}, 1, "--- rank 1\nTraceback of boom"),
        ({0: SequenceParallelConfigError("heads are odd")}, 2, "error: heads are odd"),
    ],
)
def test_ranks_that_raise(
    monkeypatch: pytest.MonkeyPatch, errors: dict[int, BaseException], status: int, words: str
) -> None:
    def fail(cases: Sequence[Case], timeout: float) -> list[CaseResult]:
        raise RankFailure("--- rank 1\nTraceback of boom", errors)

    monkeypatch.setattr(cli, "verify_cases", fail)
    shown = run(*ULYSSES, "--size", "2")
    assert shown.exit_code == status
    assert words in shown.stderr


def test_a_case_of_linear_attention_says_what_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    answer_with(monkeypatch)
    shown = run(*LASP, "--size", "3", "--decay", "kda", "--exchange", "ring", "--mask", "causal", "--json")
    assert shown.exit_code == 0, shown.output
    cases = json.loads(shown.stdout)["cases"]
    assert {(case["case"]["decay"], case["case"]["exchange"]) for case in cases} == {("kda", "ring")}
    assert all("decay=kda" in case["name"] and "exchange=ring" in case["name"] for case in cases)
    assert any("decay=kda (strong)" in case["name"] and "with states" in case["name"] for case in cases)
    assert any("shards=4,0,29" in case["name"] or "shards=4,0,33" in case["name"] for case in cases)


@pytest.mark.parametrize(("equal", "status"), [(True, 0), (False, 1)])
def test_demo_ends_as_its_comparison_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, equal: bool, status: int
) -> None:
    asked: list[Any] = []

    def run_demo(*arguments: Any) -> bool:
        asked.extend(arguments)
        return equal

    monkeypatch.setattr(demo, "run", run_demo)
    shown = run("demo", "--output", str(tmp_path), "--video-steps", "4", "--text-steps", "5")
    assert shown.exit_code == status
    assert (asked[0], asked[1].steps, asked[2].steps) == (tmp_path, 4, 5)


def test_demo_without_its_packages_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_demo(*arguments: Any) -> bool:
        raise UnsupportedError("matplotlib is not installed")

    monkeypatch.setattr(demo, "run", run_demo)
    shown = run("demo")
    assert (shown.exit_code, shown.stderr) == (2, "error: matplotlib is not installed\n")
