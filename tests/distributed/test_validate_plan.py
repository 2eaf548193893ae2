"""A plan that is wrong for its model is caught, and the first place that differs is named, with the likely reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from dsp_plugin import Plan, SequenceParallelConfig, SequenceParallelConfigError, SequenceParallelGroups, Stage
from dsp_plugin.plans.stage import Region
from dsp_plugin.rehearsal.plan_check import PlanCheck
from dsp_plugin.rehearsal.validate import validate_plan, validate_subject
from dsp_plugin.spawn import RankFailure, spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

BATCH, FRAMES, PATCHES, WIDTH, HEADS = 2, 5, 7, 8, 2


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x_NLC: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x_NLC), "n l (three h d) -> three n h l d", three=3, h=HEADS)
        return self.out(rearrange(F.scaled_dot_product_attention(q, k, v), "n h l d -> n l (h d)"))


class Layer(nn.Module):
    """Attention along the middle dim, and an MLP; each of the n sequences is scaled by a condition of its own."""

    def __init__(self, quirk: str, frames: int) -> None:
        super().__init__()
        self.quirk, self.frames = quirk, frames
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH))

    def forward(self, x_NLC: Tensor, cond_NC: Tensor) -> Tensor:
        if self.quirk == "counts frames" and self.frames > 1:
            x_NLC = rearrange(x_NLC, "(b t) s c -> b t s c", t=self.frames).flatten(0, 1)
        if self.quirk == "breaks on two" and len(x_NLC) == 2:
            raise ValueError("two sequences")
        if self.quirk == "shifts":
            x_NLC = x_NLC + 0.5 * x_NLC.roll(1, dims=1)
        if self.quirk == "drops":
            x_NLC = F.dropout(x_NLC, 0.5, training=self.training)
        x_NLC = x_NLC + self.attn(x_NLC * (1 + cond_NC[:, None]))
        return x_NLC + self.mlp(x_NLC)


class Video(nn.Module):
    """Interleaved space and time layers, as third-party models have them.

    Args:
        quirk: what makes the plan of the plain model wrong for this one.
    """

    def __init__(self, quirk: str = "", frames: int = FRAMES) -> None:
        super().__init__()
        self.quirk = quirk
        self.embed, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3)
        self.space = nn.ModuleList(Layer(quirk, frames) for _ in range(2))
        self.time = nn.ModuleList(Layer(quirk, 1) for _ in range(2))
        self.temporal_embed = nn.Parameter(torch.randn(1, frames, WIDTH))
        self.register = nn.Parameter(torch.randn(WIDTH))
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, video: Tensor, cond: Tensor) -> Tensor:
        batch, frames, patches, _ = video.shape
        x = rearrange(self.embed(video), "b t s c -> (b t) s c")
        cond_space, cond_time = repeat(cond, "b c -> (b t) c", t=frames), repeat(cond, "b c -> (b s) c", s=patches)
        for index, (space, time) in enumerate(zip(self.space, self.time, strict=True)):
            kept = x
            if self.quirk == "register":
                x = torch.cat([self.register.expand(len(x), 1, -1), x], dim=1)
            x = space(x, cond_NC=cond_space)
            if self.quirk == "register":
                x = x[:, 1:]
            if self.quirk == "batch norm" and index == 1:
                x = self.norm(x.transpose(1, 2)).transpose(1, 2)
            x = rearrange(x, "(b t) s c -> (b s) t c", b=batch)
            if index == 0:
                x = x + self.temporal_embed
            if self.quirk == "mean over frames" and index == 1:
                x = x - x.mean(dim=1, keepdim=True)
            x = rearrange(time(x, cond_time), "(b s) t c -> (b t) s c", b=batch)
        if self.quirk == "residual":
            x = x + kept.mean()
        if self.quirk == "gradient" and kept.shape != x.shape:
            x = 2 * x - x.detach()
        return rearrange(self.head(x), "(b t) s c -> b t s c", b=batch)


class Trunk(nn.Module):
    """Between its entry and its first stage, it counts frames by its settings."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.space, self.time = Layer("", frames), Layer("", frames)

    def forward(self, x_BTSC: Tensor, cond_BC: Tensor) -> Tensor:
        batch, _, patches, _ = x_BTSC.shape
        x = x_BTSC.view(batch, self.frames, patches, WIDTH)
        cond = repeat(cond_BC, "b c -> (b t) c", t=x.shape[1])
        x = rearrange(self.space(rearrange(x, "b t s c -> (b t) s c"), cond), "(b t) s c -> (b s) t c", b=batch)
        cond = repeat(cond_BC, "b c -> (b s) c", s=len(x) // batch)
        return rearrange(self.time(x, cond), "(b s) t c -> b t s c", b=batch)


class Trunked(nn.Module):
    def __init__(self, frames: int) -> None:
        super().__init__()
        self.embed, self.trunk = nn.Linear(3, WIDTH), Trunk(frames)

    def forward(self, video: Tensor, cond: Tensor) -> Tensor:
        return self.trunk(self.embed(video), cond)


SPACE = Stage("space.*", ("s",), layout="(b t) s c", follows={"cond_NC": "(b t) c"})
TIME = Stage("time.*", ("t",), layout="(b s) t c", follows={"cond_NC": "(b s) c"})
RIGHT = Plan(
    "b t s c",
    (SPACE, TIME),
    order="layers",
    inputs={"video": "b t s _"},
    buffers={"temporal_embed": "1 t c"},
)
SWAPPED = replace(RIGHT, stages=(replace(SPACE, computes_along=("t",)), replace(TIME, computes_along=("s",))))
ATTENDED = replace(RIGHT, stages=tuple(replace(stage, attention="attn", heads=HEADS) for stage in RIGHT.stages))
WITH_REGISTER = replace(RIGHT, stages=(replace(SPACE, layout="(b t) 1+s c"), TIME))


OF_TRUNK = Plan(
    "b t s c",
    (
        Stage("trunk.space", ("s",), layout="(b t) s c"),
        Stage("trunk.time", ("t",), layout="(b s) t c", follows={"cond_NC": "(b s) c"}),
    ),
    sizes={"t": FRAMES},
    overrides={"trunk.frames": -1},
    region=Region("trunk"),
)


def video(quirk: str = "", frames: int = FRAMES, batch: int = BATCH) -> tuple[nn.Module, dict[str, Any]]:
    model = Trunked(frames) if quirk == "trunk" else Video(quirk, frames)
    return model, {"video": torch.randn(batch, frames, PATCHES, 3), "cond": torch.randn(batch, WIDTH)}


class Case(NamedTuple):
    """A plan for a model, the place of its fault, and what is said of it."""

    plan: Plan
    quirk: str = ""
    place: str | None = None
    said: Sequence[str] = ()


RIGHT_CASES = {
    "plain": Case(RIGHT),
    "with a register token": Case(WITH_REGISTER, "register"),
    "with the attention named": Case(ATTENDED),
    "of a region": Case(OF_TRUNK, "trunk"),
}
WRONG_CASES = {
    "computes_along swapped": Case(
        SWAPPED, "", "in space.0", ["(sharded s): differs by", "it computes along s", "has computes_along=('t',)"]
    ),
    "follows missing": Case(
        replace(RIGHT, stages=(SPACE, replace(TIME, follows={}))),
        "",
        "in time.0",
        [
            "(sharded s): the sharded pass broke off",
            "'cond_NC' (14, 8) has a dim of 14 = b*s entries and is not in foll",
        ],
    ),
    "buffer missing": Case(
        replace(RIGHT, buffers={}),
        "",
        "between space.0 and time.0",
        ["broke off", "temporal_embed (1, 5, 8) has a dim of 5 = t entries and is not in plan.buffers"],
    ),
    "override missing": Case(
        RIGHT,
        "counts frames",
        "in space.0",
        ["broke off", "space.0.frames is 5, the size of t", "not in plan.overrides"],
    ),
    "override of a region missing": Case(
        replace(OF_TRUNK, overrides={}),
        "trunk",
        "before trunk.space",
        [
            "(sharded t): the sharded pass broke off",
            "the whole size of t is not in plan.overrides",
            "modules that ran there: embed\n",
        ],
    ),
    "register token forgotten": Case(
        RIGHT,
        "register",
        "at the entry of space.0",
        ["broke off", "tokens of space.0='(b t) s c'", "(10, 8, 8), but s should be 7"],
    ),
    "mean over frames between stages": Case(
        RIGHT,
        "mean over frames",
        "between space.1 and time.1",
        ["(sharded t): differs by", "treats all entries of t alike"],
    ),
    "batch statistics": Case(
        RIGHT,
        "batch norm",
        "between space.1 and time.1",
        ["(sharded t): differs by", "norm takes its statistics from the tokens", "modules that ran there: norm"],
    ),
    "layout in another order than memory": Case(
        replace(RIGHT, stages=(SPACE, replace(TIME, layout="(s b) t c", follows={"cond_NC": "(s b) c"}))),
        "",
        "between time.0 and space.1",
        ["(sharded s): differs by", "do not name dims in the order in which they lie in memory"],
    ),
    "a residual taken out of the region": Case(RIGHT, "residual", "after time.1", ["differs by", "such as a residual"]),
    "a gradient of other tokens": Case(RIGHT, "gradient", "the gradient of ", ["differs by"]),
    "random numbers": Case(RIGHT, "drops", "in space.0", ["differs by", "draws random numbers", "eval()"]),
}
INSIDE_CASES = {
    "right": Case(ATTENDED),
    "more than attention": Case(
        ATTENDED, "shifts", "in time.0", ["(sharded t)", "it computes along t", "attention='attn' may not match all"]
    ),
}


def _checks(size: int, method: str, cases: dict[str, Case]) -> list[PlanCheck]:
    config = SequenceParallelConfig(method=method, size=size)
    groups = SequenceParallelGroups.build(config)
    checks = []
    for case in cases.values():
        torch.manual_seed(2)
        model, kwargs = video(case.quirk)
        kwargs = {name: value.double() for name, value in kwargs.items()}
        model.double()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        checks.append(validate_plan(model, case.plan, kwargs, config=config, groups=groups))
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert all(part.training for part in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())
    return checks


def _assert_said(size: int, method: str, cases: dict[str, Case]) -> None:
    for checks in spawn(_checks, size, size, method, cases, timeout=90.0):
        for (name, case), check in zip(cases.items(), checks, strict=True):
            if case.place is None:
                assert check.ok, f"{name}: {check.fault}"
                assert check.output < check.tolerance
                assert check.gradient is not None
                assert check.gradient[1] < check.tolerance
                assert check.sent == check.planned > 0
                assert len(check.stages) == (2 if case.quirk == "trunk" else 4), name
                assert all(max(stage.given, stage.gave) < 1e-12 for stage in check.stages), name
            else:
                assert check.fault is not None, name
                assert check.fault.place.startswith(case.place), f"{name}: {check.fault}"
                assert all(part in str(check.fault) for part in case.said), f"{name}: {check.fault}"


@pytest.mark.parametrize("size", [2, 3])
def test_right_plans_pass_and_wrong_ones_are_named_with_their_mistake(size: int) -> None:
    _assert_said(size, "dsp", {**RIGHT_CASES, **WRONG_CASES})


def test_what_runs_beside_attention_inside_a_stage_is_named() -> None:
    _assert_said(2, "ulysses", INSIDE_CASES)


REFERENCE = f"{__name__}:video"


def test_a_subject_is_checked_on_ranks_of_its_own_in_evaluation_if_it_draws_random_numbers() -> None:
    check = validate_subject(REFERENCE, {"quirk": "drops"}, f"{__name__}:RIGHT", 2)
    assert check.ok, check.fault
    assert check.sent == check.planned > 0


def test_a_rank_that_breaks_off_alone_is_heard() -> None:
    # Of three frames the first rank has two, the second one, which goes on and waits.
    check = validate_subject(REFERENCE, {"quirk": "breaks on two", "frames": 3, "batch": 1}, f"{__name__}:RIGHT", 2)
    assert check.fault is not None
    assert str(check.fault).startswith("in space.0 (sharded t): the sharded pass broke off: ValueError: two sequences")


def test_what_cannot_be_built_is_refused_as_such() -> None:
    with pytest.raises(SequenceParallelConfigError, match="matches no module"):
        validate_subject(REFERENCE, {}, f"{__name__}:MISNAMED", 2)


MISNAMED = replace(RIGHT, stages=(replace(SPACE, modules="spaces.*"), TIME))


def _ranks_apart() -> None:
    config = SequenceParallelConfig(method="dsp", size=2)
    groups = SequenceParallelGroups.build(config)
    torch.manual_seed(groups.sp.rank)
    model, kwargs = video()
    validate_plan(model, RIGHT, kwargs, config=config, groups=groups)


def test_ranks_with_different_weights_are_refused() -> None:
    with pytest.raises(RankFailure, match="they hold different weights or arguments"):
        spawn(_ranks_apart, 2)
