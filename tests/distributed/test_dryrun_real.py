"""What a dry run says of a small size, ranks do: bytes exactly, memory, as the allocator reports it, within a tenth."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from dsp_plugin import SequenceParallelConfig
from dsp_plugin.cli import dryrun as cli_dryrun
from dsp_plugin.models.linear_lm import LinearLM, LinearLMConfig
from dsp_plugin.rehearsal.dryrun import Job, RankRun, dry_run, real_rank
from dsp_plugin.rehearsal.subject import Subject, subject
from dsp_plugin.spawn import spawn

pytestmark = pytest.mark.distributed

VIDEO = {"frames": 9, "height": 24, "width": 20, "hidden": 64, "heads": 4, "depth": 2, "channels": 2}
WIDER = {**VIDEO, "hidden": 128, "depth": 3}
BLOCKS = "model.blocks.*"


def job(method: str, size: int, recompute: str | None, dtype: torch.dtype = torch.float32) -> Job:
    config = SequenceParallelConfig(method=method, size=size)
    settings = VIDEO if dtype == torch.float32 else WIDER
    return Job(partial(subject, "video-dit", settings), config, dtype, recompute)


def _language_model() -> Subject:
    ids = torch.randint(50, (2, 202))
    model = LinearLM(LinearLMConfig(vocab=50, width=64, heads=4, layers=4, softmax_every=2))
    return Subject(model, {"input_ids": ids, "labels": ids})


def _real_ranks(jobs: list[Job]) -> list[RankRun]:
    return [real_rank(job) for job in jobs]


def _compare(jobs: list[Job], size: int) -> None:
    by_rank = spawn(_real_ranks, size, jobs, timeout=120.0)
    for index, each in enumerate(jobs):
        for rank in {0, size - 1}:
            dry, real = dry_run(each, size, rank), by_rank[rank][index]
            assert dry.rows == real.rows
            assert dry.memory[:3] == real.memory[:3]
            assert dry.memory.activations == pytest.approx(real.memory.activations, rel=0.1), each
            assert dry.memory.peak == pytest.approx(real.memory.peak, rel=0.1), each


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.matrix)])
def test_a_dry_run_has_the_bytes_and_the_memory_of_the_real_run(size: int) -> None:
    methods = ("dsp", "ulysses") if size > 1 else ("dsp",)
    _compare([job(method, size, recompute) for method in methods for recompute in (None, BLOCKS)], size)


@pytest.mark.matrix
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_so_it_has_in_bf16_for_a_vit_and_by_other_methods(size: int) -> None:
    vit = partial(subject, "vit", {"height": 48, "width": 40, "depth": 3})
    jobs = [
        Job(vit, SequenceParallelConfig(method=method, size=size), dtype, recompute)
        for method in ("dsp", "ulysses")
        for dtype in (torch.float32, torch.bfloat16)
        for recompute in (None, "model.trunk.blocks.*")
    ]
    # Not recomputed: what is left then is no more than ten times the copy of a weight that oneDNN packs in bf16.
    videos = [job(method, size, None, torch.bfloat16) for method in ("dsp", "ulysses")]
    others = [job("ring", size, None), Job(_language_model, SequenceParallelConfig(method="lasp", size=size))]
    wide = {"head_dim": 32, "depth": 3}
    theirs = [
        Job(
            partial(subject, name, {"heads": 4 if size < 3 else size, **wide}),
            SequenceParallelConfig(method="dsp", size=size),
        )
        for name in ("wan", "latte")
    ]
    _compare([*jobs, *videos, *others, *theirs], size)


def run(*arguments: str) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    cli_dryrun.register(app)
    return CliRunner().invoke(app, ["dry-run", *arguments])


def test_the_command_prints_both_runs_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--model", "video-dit", "--size", "2", "--set", "frames=9", "--real")
    real = cli_dryrun.real_run
    kept: list[RankRun] = []

    def once(*arguments: Any) -> list[RankRun]:
        if not kept:
            kept.extend(real(*arguments))
        return kept

    monkeypatch.setattr(cli_dryrun, "real_run", once)
    shown = run(*asked)
    assert shown.exit_code == 0, shown.output
    rows = {line.split()[0]: line.split()[1:] for line in shown.stdout.splitlines() if line.strip()}
    sent_dry, sent_real = rows["all"][-2:]
    assert sent_dry == sent_real != "0"
    monkeypatch.setattr(cli_dryrun, "MEMORY_TOLERANCE", -1.0)
    differing = run(*asked)
    assert differing.exit_code == 1
    assert "DIFFERS peak memory" in differing.stdout
