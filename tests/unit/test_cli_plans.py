"""What `plan-stages` says of a model, from a dry run that starts no rank."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

from dsp_plugin import Plan, Stage
from dsp_plugin.cli import plans as cli_plans
from dsp_plugin.planner.moves import Activation, Border
from dsp_plugin.planner.stages import AttentionShape, StageSpec
from dsp_plugin.planner.stages import plan_stages as plan_of
from dsp_plugin.rehearsal.plan_check import Fault, PlanCheck, StageCheck
from dsp_plugin.spawn import RankFailure

pytestmark = pytest.mark.timeout(120)

LAYERS, FRAMES, PATCHES, WIDTH, HEADS, SIZE = 3, 8, 6, 16, 4, 4


class Mix(nn.Module):
    """Mixes along one dim of [b, t, s, c] without attention."""

    def __init__(self, dim: int, length: int) -> None:
        super().__init__()
        self.dim, self.linear = dim, nn.Linear(length, length)

    def forward(self, x_BTSC: Tensor) -> Tensor:
        return x_BTSC + self.linear(x_BTSC.movedim(self.dim, -1)).movedim(-1, self.dim)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.space, self.time = Mix(2, PATCHES), Mix(1, FRAMES)

    def forward(self, x_BTSC: Tensor) -> Tensor:
        return self.time(self.space(x_BTSC))


class Grid(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.gain = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gain
        for layer in self.layers:
            x = layer(x)
        return x


def grid(layers: int = LAYERS) -> tuple[nn.Module, dict[str, Any]]:
    return Grid(layers), {"x": torch.randn(1, FRAMES, PATCHES, WIDTH)}


plan = Plan("b t s c", (Stage("layers.*.space", ("s",)), Stage("layers.*.time", ("t",))))
swapped = Plan("b t s c", (Stage("layers.*.space", ("t",)), Stage("layers.*.time", ("s",))))
ARGUMENTS = ("--model", f"{__name__}:grid", "--plan", f"{__name__}:plan", "--size", str(SIZE))


@pytest.fixture(autouse=True)
def _no_launched_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.callback()(lambda: None)
    cli_plans.register(app)
    return CliRunner().invoke(app, ["plan-stages", *arguments])


def the_plan(layers: int = LAYERS) -> Any:
    stages = [StageSpec(f"layers.{index}.{kind}", (dim,)) for index in range(layers) for kind, dim in KINDS]
    return plan_of(Activation({"b": 1, "t": FRAMES, "s": PATCHES}, WIDTH, 4), stages, SIZE)


KINDS = (("space", "s"), ("time", "t"))


def test_stages_of_one_kind_share_a_row_and_each_has_one_with_all() -> None:
    shown = run(*ARGUMENTS)
    assert shown.exit_code == 0, shown.output
    rows = [line.split() for line in shown.stdout.splitlines() if line.startswith("layers")]
    assert [row[:2] for row in rows] == [["layers.0.space", "1"], ["layers.*.time", "3"], ["layers.*.space", "2"]]
    everything = run(*ARGUMENTS, "--all")
    names = [line.split()[0] for line in everything.stdout.splitlines() if line.startswith("layers")]
    assert names == [row.stage for row in the_plan().rows]


def test_bytes_and_totals_are_those_of_the_planner() -> None:
    wanted = the_plan()
    found = json.loads(run(*ARGUMENTS, "--all", "--json").stdout)
    assert found["total"] == found["totals"]["dsp"] == wanted.total
    assert found["leave"] == wanted.leave._asdict()
    for row, expected in zip(found["stages"], wanted.rows, strict=True):
        assert row["stage"] == expected.stage
        assert row["wire"] == expected.wire._asdict()
        assert (row["sharded"], row["move"], row["inside"]) == (expected.sharded, expected.move, "local")
        assert "names no attention" in row["instead"]
    reasons = [f"{dim} by layers.*.{kind} (the stage computes along {dim}" for kind, dim in KINDS]
    assert all(found["totals"]["ulysses"].count(reason) == 1 for reason in reasons)
    halves = json.loads(run(*ARGUMENTS, "--dtype", "bfloat16", "--json").stdout)
    assert 2 * halves["total"] == wanted.total


def test_what_the_plan_beat_is_said_in_bytes() -> None:
    shown = run("--model", "video-dit", "--size", "4", "--set", "frames=8", "--set", "depth=2")
    assert shown.exit_code == 0, shown.output
    # Of 8 frames of 64 patches, and 64 features of 4 bytes; they come and go as 64 pixels.
    attention = AttentionShape(4, 4, 16)
    blocks = [StageSpec(f"model.blocks.{index}.{kind}", (dim,), attention) for index in range(2) for kind, dim in KINDS]
    stages = [StageSpec("model.patch_embed", ()), *blocks, StageSpec("model.final", ())]
    activation = Activation({"b": 1, "t": 8, "s": 64}, 64, 4)
    border = {"enter": Border(256, backward=False), "leave": Border(256)}
    dsp = plan_of(activation, stages, 4, **border)
    ulysses = plan_of(activation, stages, 4, switching=False, **border)
    more = dsp.rows[1].alternatives["s"]
    assert isinstance(more, int)
    assert f"s: {more - dsp.total:,} bytes more" in shown.stdout
    assert f"dsp: {dsp.total:,} bytes" in shown.stdout
    ratio = ulysses.total / dsp.total
    assert f"one dim sharded throughout: {ulysses.total:,} bytes, {ratio:.2f} times as many" in shown.stdout


def test_a_plan_that_cannot_run_is_refused_and_leads_to_validate() -> None:
    refused = run("--model", f"{__name__}:grid", "--plan", f"{__name__}:swapped", "--size", "2")
    assert refused.exit_code == 2
    assert "sharded by it, the model broke off with" in refused.stderr
    assert "--validate" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "video-dti", "--size", "2"), "is no known model"),
        (("--model", "video-dit", "--size", "2", "--set", "frame=3"), "has no such setting"),
        (("--model", "video-dit", "--size", "2", "--method", "dps"), "the nearest is 'dsp'"),
        (("--model", "video-dit", "--size", "2", "--plan", "nowhere:plan"), "cannot be imported"),
    ],
)
def test_wrong_requests_are_one_line(arguments: tuple[str, ...], said: str) -> None:
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert said in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert refused.stdout == ""


RIGHT = PlanCheck(None, (StageCheck("a", "t", 0.0, 1e-16),), 2e-16, ("w", 3e-16), 1e-9, False, 10, 10)
WRONG = PlanCheck(Fault("in layers.0.time", "layers.0.time", "s", float("inf"), "ValueError: no", ("a reason",)))


def test_validation_is_asked_of_small_settings_and_decides_the_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    answers = [RIGHT, WRONG, WRONG]

    def validate(model: str, settings: dict[str, Any], *rest: Any, **named: Any) -> PlanCheck:
        asked.append((settings, *rest))
        return answers.pop(0)

    monkeypatch.setattr(cli_plans, "validate_subject", validate)
    right = run(*ARGUMENTS, "--set", "layers=2", "--small", "layers=1", "--validate")
    assert right.exit_code == 0, right.output
    assert asked == [({"layers": 1}, f"{__name__}:plan", SIZE, "dsp")]
    assert "layers.1.space" in right.stdout
    assert "The plan is right for the model: 1 stages" in right.stdout
    assert "sent 10 bytes, and the stage table has 10" in right.stdout
    wrong = run(*ARGUMENTS, "--validate")
    assert wrong.exit_code == 1
    assert "First difference in layers.0.time (sharded s): the sharded pass broke off: ValueError: no" in wrong.stdout
    assert "maybe: a reason" in wrong.stdout
    found = json.loads(run(*ARGUMENTS, "--validate", "--json").stdout)
    assert found["check"]["ok"] is False
    assert found["check"]["fault"]["error"] == "inf"
    assert "stages" not in found


def test_ranks_that_die_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def validate(*_: Any, **__: Any) -> PlanCheck:
        raise RankFailure("rank 1 died", {})

    monkeypatch.setattr(cli_plans, "validate_subject", validate)
    failed = run(*ARGUMENTS, "--validate")
    assert failed.exit_code == 1
    assert "rank 1 died" in failed.stderr
