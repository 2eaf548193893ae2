"""Plans: globs over module names, and every plan that cannot be meant refused with its reason."""

from __future__ import annotations

import pytest
from torch import nn

from dsp_plugin import Plan, Region, SequenceParallelConfigError, Stage
from dsp_plugin.models.video_dit import VideoDiT
from dsp_plugin.plans.plan import matching_modules, outermost, resolve_plan
from dsp_plugin.sharding.region import placed_stages

SPACE, TIME = Stage("blocks.*.space", ("s",)), Stage("blocks.*.time", ("t",))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.space, self.time = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer() for _ in range(11))


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("blocks.*.space", [f"blocks.{i}.space" for i in range(11)]),
        ("blocks.1.*", ["blocks.1.space", "blocks.1.time"]),
        ("blocks.1*.time", ["blocks.1.time", "blocks.10.time"]),
        ("blocks.10", ["blocks.10"]),
        ("**.time.0", [f"blocks.{i}.time.0" for i in range(11)]),
        ("blocks.0.**", ["blocks.0.space", "blocks.0.time", "blocks.0.time.0"]),
    ],
)
def test_globs_match_names_in_model_order(pattern, names):
    assert list(matching_modules(Model(), pattern, "attention")) == names


def test_a_dot_is_a_dot_and_a_star_stops_at_it():
    assert list(matching_modules(Model(), "blocks.*", "attention")) == [f"blocks.{i}" for i in range(11)]
    with pytest.raises(SequenceParallelConfigError, match="matches no module"):
        matching_modules(Model(), "blocks*space", "attention")
    with pytest.raises(SequenceParallelConfigError) as refused:
        matching_modules(Model(), "blocks.*.spice", "attention")
    for part in ("attention='blocks.*.spice'", "no module of Model", "blocks.0.space", ", ...", "named_modules()"):
        assert part in str(refused.value)


def test_layers_run_by_number_and_modules_without_one_where_they_are_listed():
    class Turns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.embed = nn.Identity(), nn.Identity()
            self.space = nn.ModuleList(nn.Identity() for _ in range(2))
            self.time = nn.ModuleList(nn.Identity() for _ in range(2))

    stages = (Stage("embed", ()), Stage("time.*", ("t",)), Stage("space.*", ("s",)), Stage("norm", ()))
    placed = placed_stages(Turns(), Plan("b t s c", stages, order="layers"))
    assert [place.name for place in placed] == ["embed", "time.0", "space.0", "time.1", "space.1", "norm"]
    placed = placed_stages(Turns(), Plan("b t s c", stages))
    assert [place.name for place in placed] == ["norm", "embed", "space.0", "space.1", "time.0", "time.1"]


def test_outermost_drops_what_is_inside_another():
    found = matching_modules(Model(), "blocks.0.**", "attention")
    assert list(outermost(found)) == ["blocks.0.space", "blocks.0.time"]
    assert list(outermost({"a.b": nn.Identity(), "a.bc": nn.Identity()})) == ["a.b", "a.bc"]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Plan("b t", (TIME,)), ["plan.tokens='b t'", "features last", 'Write "b t s c"']),
        (lambda: Plan("b t t c", (TIME,)), ["plan.tokens='b t t c'", "distinct name"]),
        (lambda: Plan("b t s c", ()), ["plan.stages=()", "at least one stage"]),
        (lambda: Plan("b t c", (SPACE,)), ["'blocks.*.space' computes_along", "['s']", "['b', 't']", "plan.tokens"]),
        (lambda: Plan("b t s c", (Stage("x", ("c",)),)), ["computes_along=('c',)", "['b', 't', 's']"]),
        (
            lambda: Plan("b t s c", (Stage("x", ("s",), attention="attn"),)),
            ["'x' heads", "attention='attn'", "heads=..."],
        ),
        (lambda: Plan("b t s c", (Stage("x", (), takes="b t p"),)), ["'x' takes='b t p'", "does not name s"]),
        (
            lambda: Plan("b t s c", (Stage("x", (), gives="b t s p"),), between="t"),
            ["'x' gives='b t s p'", "between stages", "Region("],
        ),
        (
            lambda: Plan("b t s c", (Stage("x", ("s",), follows={"rope": "d"}),)),
            ["'x' follows 'rope'='d'", "['b', 't', 's']", "never be cut"],
        ),
    ],
)
def test_impossible_plans_are_refused(make, parts):
    with pytest.raises(SequenceParallelConfigError) as refused:
        make()
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize("setting", ["takes", "gives"])
def test_only_the_ends_may_have_other_features(setting):
    first, last = Stage("blocks.*.space", ("s",)), Stage("blocks.*.time", ("t",), **{setting: "b t s p"})
    with pytest.raises(SequenceParallelConfigError, match=setting) as refused:
        placed_stages(Model(), Plan("b t s c", (first, last)))
    assert "blocks.0.time is not the" in str(refused.value)
    assert "plan.order" in str(refused.value)


def test_the_plan_of_a_known_model_is_found_inside_a_wrapper():
    model = VideoDiT(width=16, heads=2, depth=1)
    root, plan = resolve_plan(nn.Sequential(nn.Identity(), model), None)
    assert root is model
    assert [stage.computes_along for stage in plan.stages] == [(), ("s",), ("t",), ()]


for_reference = Plan("b t s c", (SPACE, TIME))


def leaving(module: nn.Module) -> Plan:
    raise SystemExit(3)


def failing(module: nn.Module) -> Plan:
    raise KeyError("depth")


def impossible(module: nn.Module) -> Plan:
    return Plan("b t", ())


def plan_of(module: nn.Module) -> Plan:
    return Plan("b t s c", (SPACE,)) if isinstance(module, Model) else for_reference


def test_further_tokens_may_stand_behind_by_name():
    """As docs/configuration.md shows it: the k are those that are not among the plan's tokens."""

    def plan(further: str) -> Plan:
        stage = Stage("space", ("s",), layout=f"(b t) {further} c", follows={"rope": f"{further} d"})
        region = Region("space", layout=f"(b t) {further} c")
        return Plan(
            "b t s c", (stage,), inputs={"x": f"b t {further} _"}, buffers={"pos": f"1 {further} c"}, region=region
        )

    assert plan("s+k") == plan("(s)+k") != plan("k+s")
    assert plan("s+3") == plan("(s)+3")
    named = plan("s+k")
    layout = named.layout_of(named.stages[0])
    assert layout.names == ("b", "t", "s", "c")
    assert [(group.before, group.behind) for group in layout.groups] == [(None, None), (None, "k"), (None, None)]
    assert layout.solve((6, 9, 4), {"b": 2, "s": 7}, "here") == {"b": 2, "s": 7, "t": 3, "k": 2, "c": 4}


def test_references_lead_to_plans_and_to_functions_that_make_them():
    model = Model()
    assert resolve_plan(model, f"{__name__}:for_reference") == (model, for_reference)
    assert resolve_plan(model, f"{__name__}:plan_of") == (model, Plan("b t s c", (SPACE,)))


@pytest.mark.parametrize(
    ("reference", "parts"),
    [
        ("no_such_package.plans:mine", ["plan='no_such_package.plans:mine'", "No module named", "package.module:name"]),
        (f"{__name__}:missing", ["cannot be imported", "missing"]),
        (f"{__name__}:leaving", [f"plan='{__name__}:leaving'", "called with the model (Model)", "SystemExit: 3"]),
        (f"{__name__}:failing", ["called with the model (Model)", "KeyError: 'depth'", "returns one"]),
        (f"{__name__}:impossible", ["plan.tokens='b t'", "features last"]),
        ("builtins:exit", ["plan='builtins:exit'", "called with the model (Model)", "SystemExit"]),
        ("builtins:len", ["plan='builtins:len'", "TypeError", "returns one"]),
        ("leaving_plans:plan", ["importing leaving_plans failed with SystemExit: 5", "Correct that module"]),
        ("broken_plans:plan", ["importing broken_plans failed with SyntaxError", "broken_plans.py"]),
        (f"{__name__}:SPACE", ["is a Stage, not a dsp_plugin.Plan", "Name a Plan"]),
        (None, ["no plan is known for", "Model", "VideoDiT", "Write a Plan"]),
    ],
)
def test_references_that_lead_nowhere_are_refused(reference, parts, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaving_plans.py").write_text("import sys\nsys.exit(5)\n")
    (tmp_path / "broken_plans.py").write_text("plan = Plan(\n")
    with pytest.raises(SequenceParallelConfigError) as refused:
        resolve_plan(Model(), reference)
    for part in parts:
        assert part in str(refused.value)
