"""Subjects by name, bytes alive over time, and dry runs: of every rank, of many ranks, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import typer
from torch import nn
from typer.testing import CliRunner

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError, UnsupportedError
from dsp_plugin.cli import dryrun as cli_dryrun
from dsp_plugin.models.linear_lm import LinearLM, LinearLMConfig
from dsp_plugin.rehearsal.dryrun import Job, dry_run
from dsp_plugin.rehearsal.memory import AllocatorLog, StorageTracker
from dsp_plugin.rehearsal.model_states import model_states
from dsp_plugin.rehearsal.subject import Subject, parse_settings, subject
from dsp_plugin.rehearsal.timeline import Timeline

pytestmark = pytest.mark.timeout(120)

SMALL = {"frames": 7, "height": 12, "width": 20, "hidden": 32, "depth": 1}


def job(settings: dict[str, Any] = SMALL, method: str = "dsp", size: int = 1, **more: Any) -> Job:
    return Job(partial(subject, "video-dit", settings), SequenceParallelConfig(method=method, size=size), **more)


def run(*arguments: str) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    cli_dryrun.register(app)
    return CliRunner().invoke(app, ["dry-run", *arguments])


# --- subjects


def test_settings_are_numbers_where_they_read_as_numbers() -> None:
    assert parse_settings(["a=3", "b=0.5", "c=axial", "d=-1"]) == {"a": 3, "b": 0.5, "c": "axial", "d": -1}


@pytest.mark.parametrize("items", [["frames"], ["=3"], ["a b=3"], ["a=1", "a=2"]])
def test_settings_of_another_form_are_refused(items: list[str]) -> None:
    with pytest.raises(SequenceParallelConfigError, match="--set"):
        parse_settings(items)


def build_without_tensors(width: int) -> tuple[nn.Module, dict[str, Any]]:
    return nn.Linear(width, width), {}


@pytest.mark.parametrize(
    ("reference", "settings", "said"),
    [
        ("video-dti", {}, "is no known model"),
        ("no_such_package.models:one", {}, "cannot be imported"),
        ("dsp_plugin.rehearsal.subject:KNOWN_SUBJECTS", {}, "not a function"),
        ("video-dit", {"frame": 3}, "no such setting.*frames=16"),
        ("video-dit", {"frames": 3.5}, "takes int"),
        ("video-dit", {"height": 13}, "13 x 32 pixels do not divide"),
        ("vit", {"attention": "sideways"}, "choose 'full' or 'axial'"),
        (f"{__name__}:build_without_tensors", {}, "width must be set"),
        (f"{__name__}:build_without_tensors", {"width": 3}, "returned no tensors"),
        ("builtins:list", {}, "returned list"),
    ],
)
def test_a_wrong_subject_is_named_with_what_is_wrong(reference: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SequenceParallelConfigError, match=said):
        subject(reference, settings)


@pytest.mark.parametrize("name", ["video-dit", "vit"])
def test_subjects_that_we_ship_have_a_loss(name: str) -> None:
    built = subject(name, {})
    assert built.module(**built.kwargs).numel() == 1


# --- bytes alive over time


def test_a_peak_is_the_most_that_is_alive_at_once() -> None:
    timeline = Timeline()
    first = timeline.allocate(100)
    second = timeline.allocate(30)
    timeline.free(first)
    timeline.allocate(60)
    timeline.free(second)
    assert timeline.peak() == 130
    assert timeline.peak(without={first}) == 90


@pytest.mark.parametrize("log", [StorageTracker(), AllocatorLog()], ids=lambda log: type(log).__name__)
def test_both_instruments_count_storages_once_while_they_live(log: StorageTracker | AllocatorLog) -> None:
    before = torch.randn(1000)
    with log:
        view = before[10:].view(-1)
        twice = torch.randn(64, 64).neg()
        shared = [twice[0], twice.T, twice]
        del twice, shared
        last = torch.randn(100)
    assert view.numel() == 990
    assert log.timeline.peak() == 2 * 64 * 64 * 4
    assert log.timeline.peak(without=log.keys_of([last])) == 2 * 64 * 64 * 4
    assert len(log.keys_of([before, view, last])) == 1


# --- dry runs


@pytest.mark.parametrize("method", ["dsp", "ulysses"])
def test_dry_runs_of_all_ranks_add_up_to_the_stage_table(method: str) -> None:
    runs = [dry_run(job(method=method, size=3), 3, rank) for rank in range(3)]
    plan = runs[0].stage_plan
    assert plan is not None
    assert sum(run.nbytes for run in runs) == plan.total > 0
    assert len({run.nbytes for run in runs}) > 1


def test_sharding_and_recomputation_save_memory_and_the_latter_costs_bytes() -> None:
    settings = {**SMALL, "frames": 16, "height": 32, "depth": 3}
    whole, quarter = dry_run(job(settings), 1), dry_run(job(settings, size=4), 4)
    again = dry_run(job(settings, size=4, recompute="model.blocks.*"), 4)
    assert whole.nbytes == 0 < quarter.nbytes < again.nbytes
    assert whole.memory.peak / 4.2 < quarter.memory.activations < whole.memory.activations / 2.5
    assert again.memory.activations < quarter.memory.activations / 1.8
    assert whole.memory.gradients == quarter.memory.gradients == whole.memory.parameters


@pytest.mark.parametrize(("name", "blocks"), [("wan", "blocks.*"), ("latte", "*transformer_blocks.*")])
def test_what_plans_name_is_found_under_recomputation(name: str, blocks: str) -> None:
    pytest.importorskip("diffusers")
    runs = {}
    for recompute in (None, blocks):
        asked = Job(partial(subject, name, {}), SequenceParallelConfig(method="dsp", size=2), recompute=recompute)
        runs[recompute] = dry_run(asked, 2)
    assert runs[None].memory.activations > runs[blocks].memory.activations
    assert runs[None].nbytes <= runs[blocks].nbytes


def test_forward_alone_has_no_gradients_and_half_the_bytes() -> None:
    forward = dry_run(job(size=2, backward=False), 2)
    assert forward.memory.gradients == 0
    assert {row.phase for row in forward.rows} == {"forward"}


def test_a_rank_of_512_is_dry_run_in_this_process() -> None:
    settings = {**SMALL, "frames": 64, "height": 32, "width": 32}
    run = dry_run(job(settings, size=64, dtype=torch.bfloat16), 512, rank=77)
    assert run.stage_plan is not None
    assert run.nbytes * 64 == run.stage_plan.total
    assert not dist.is_initialized()


@pytest.fixture
def _a_world() -> Iterator[None]:
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_a_world")
def test_a_dry_run_leaves_a_real_world_alone() -> None:
    with pytest.raises(SequenceParallelConfigError, match="2 ranks is up"):
        dry_run(job(size=2), 2)
    assert dist.get_world_size() == 2


@pytest.mark.parametrize(("size", "world", "rank"), [(3, 4, 0), (2, 2, 2), (2, 2, -1)])
def test_a_job_that_does_not_fit_the_world_is_refused(size: int, world: int, rank: int) -> None:
    with pytest.raises(SequenceParallelConfigError):
        dry_run(job(size=size), world, rank)
    assert not dist.is_initialized()


def test_debug_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSP_PLUGIN_DEBUG", "1")
    with pytest.raises(SequenceParallelConfigError, match="a dry run has one"):
        dry_run(job(size=2), 2)


class Reads(nn.Module):
    """Decides by a value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the shape of x."""
        return self.linear(x) if x.sum() > 0 else x


def language_model(inside: nn.Module | None = None) -> Subject:
    """A `LinearLM`, after something else if given."""
    ids = torch.randint(50, (2, 24))
    model = LinearLM(LinearLMConfig(vocab=50, width=32, heads=2, layers=2, softmax_every=2))
    if inside is not None:
        model.layers.insert(0, inside)
        model.layers[0].forward = lambda x, rope, forward=inside.forward: forward(x[..., :8])
    return Subject(model, {"input_ids": ids, "labels": ids})


def test_what_reads_values_of_tensors_is_refused_and_leaves_nothing_behind() -> None:
    states = torch.get_rng_state, torch.set_rng_state
    config = SequenceParallelConfig(method="lasp", size=2)
    with pytest.raises(UnsupportedError, match="reads values of tensors"):
        dry_run(Job(lambda: language_model(Reads()), config), 2)
    assert not dist.is_initialized()
    assert (torch.get_rng_state, torch.set_rng_state) == states
    assert torch.ones(1).item() == 1.0


def test_methods_that_shard_the_batch_are_dry_run_too() -> None:
    run = dry_run(Job(language_model, SequenceParallelConfig(method="lasp", size=4)), 4)
    assert {row.method for row in run.rows} == {"lasp", "lightseq", "loss"}
    assert run.stage_plan is None


def test_zero_partitions_optimizer_then_gradients_then_weights() -> None:
    states = [model_states(1000, torch.bfloat16, 8, stage) for stage in range(4)]
    assert [state[:3] for state in states] == [
        (2000, 2000, 12000),
        (2000, 2000, 1500),
        (2000, 250, 1500),
        (250, 250, 1500),
    ]
    assert model_states(1000, torch.float32, 8, 0).total == 16000


# --- the command


def test_the_command_shows_bytes_memory_and_model_states() -> None:
    shown = run("--model", "video-dit", "--size", "2", "--set", "depth=1", "--set", "hidden=32", "--unsharded")
    assert shown.exit_code == 0, shown.output
    assert "all_to_all" in shown.stdout
    assert "activations" in shown.stdout
    assert "By arithmetic, not run" in shown.stdout
    assert "peak / dry   1.000  " in shown.stdout


def test_the_command_as_json() -> None:
    shown = run("--model", "vit", "--size", "4", "--world-size", "8", "--dtype", "bfloat16", "--json")
    found = json.loads(shown.stdout)
    assert found["ok"]
    assert found["world_size"] == 8
    assert 4 * found["runs"]["dry"]["bytes"] == found["planned_bytes_of_all_ranks"]
    assert found["runs"]["dry"]["memory"]["parameters"] == 2 * found["parameters"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "nothing"],
        ["--model", "video-dit", "--dtype", "int3"],
        ["--model", "video-dit", "--size", "3", "--world-size", "4"],
        ["--model", "video-dit", "--size", "2", "--world-size", "4", "--real"],
        ["--model", "video-dit", "--method", "rink", "--size", "2"],
        ["--model", "video-dit", "--checkpoint", "no.such.*"],
    ],
)
def test_the_command_refuses_on_one_line(arguments: list[str]) -> None:
    shown = run(*arguments)
    assert shown.exit_code == 2
    assert shown.stderr.startswith("error: ")
    assert shown.stderr.count("\n") == 1
