"""Layers that draw random numbers while tokens are sharded: refused where every rank would have to draw the same.

Ranks draw other numbers, as they hold other tokens. What they all hold then comes apart: a class token that is whole on
every rank, or the choice whether a sample keeps a residual branch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.planner.stages import StageRow
from dsp_plugin.plans.pattern import Pattern, parse
from dsp_plugin.plans.plan import Plan
from dsp_plugin.sharding.placed import Placed

_OF_SAMPLES = re.compile("DropPath|StochasticDepth")


class RandomLayer(NamedTuple):
    """A layer that may drop something, and how tokens lie when it runs."""

    name: str
    module: nn.Module
    layout: Pattern
    sharded: str


def random_layers(
    root: nn.Module, plan: Plan, stages: Sequence[Placed], rows: Mapping[int, StageRow]
) -> list[RandomLayer]:
    """What `check_random_layers` looks at in passes that run the same stages with the same dims sharded.

    Args:
        root: what the plan's names are relative to.
        rows: of the stages that run, by their index.
    """
    found = []
    for index, row in rows.items():
        stage = stages[index]
        named = stage.module.named_modules(prefix=stage.name)
        found += _random(named, plan.layout_of(stage.stage), row.sharded)
    first = plan.layout_taken(stages[next(iter(rows))].stage)
    layout = first if plan.region is None else parse(plan.region.layout or plan.tokens)
    between = _modules_between(root, plan, stages)
    for sharded in {plan.between} if plan.between else {row.sharded for row in rows.values()}:
        found += _random(between, layout, sharded)
    return found


def check_random_layers(layers: Iterable[RandomLayer]) -> None:
    """Check one training pass, before anything is sent.

    Raises:
        UnsupportedError: a layer drops whole samples, or features of tokens that every rank holds.
    """
    for name, module, layout, sharded in layers:
        probability = _probability(module)
        if probability == 0.0:
            continue
        if not _OF_SAMPLES.search(type(module).__name__):
            if any(group.extended for group in layout.groups) and sharded not in layout.extra_names:
                raise UnsupportedError(
                    setting=f"dropout of {name}",
                    value=probability,
                    why=f"while {sharded} is sharded every rank holds the further tokens of {layout.text!r}, and "
                    f"would drop other features of them",
                    remedy="set its p to 0; dropout of attention weights may stay, and what is outside of the region",
                )
        # Of samples folded with positions, such as (b t), ranks hold other ones.
        elif sharded not in layout.groups[0].names:
            raise UnsupportedError(
                setting=f"drop path of {name}",
                value=probability,
                why=f"it decides for a whole sample, of which every rank holds a part while {sharded} is sharded, and "
                f"would decide otherwise",
                remedy="set its probability to 0",
            )


def _random(modules: Iterable[tuple[str, nn.Module]], layout: Pattern, sharded: str) -> list[RandomLayer]:
    return [
        RandomLayer(name, module, layout, sharded)
        for name, module in modules
        if isinstance(module, nn.modules.dropout._DropoutNd) or _OF_SAMPLES.search(type(module).__name__)
    ]


def _modules_between(root: nn.Module, plan: Plan, stages: Sequence[Placed]) -> list[tuple[str, nn.Module]]:
    """Those of the region, or, without one, of what the stages are in."""
    if plan.region is not None:
        around = {plan.region.module}
    else:
        around = {stage.name[: dot.start()] for stage in stages for dot in re.finditer(r"\.", stage.name)}
    inside = tuple(f"{stage.name}." for stage in stages)
    return [
        (name, module)
        for name, module in root.named_modules()
        if any(name.startswith(f"{part}.") for part in around) and not f"{name}.".startswith(inside)
    ]


def _probability(module: nn.Module) -> float:
    """That with which it drops something now."""
    if not module.training:
        return 0.0
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p
    return float(getattr(module, "drop_prob", getattr(module, "p", 0.0)) or 0.0)
