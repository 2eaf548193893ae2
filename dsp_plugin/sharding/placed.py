"""The modules of a plan's stages, found in a model."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from torch import nn

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.plans.plan import Plan, matching_modules
from dsp_plugin.plans.stage import Stage


@dataclass(frozen=True)
class Placed:
    """One stage in the order in which stages run."""

    name: str
    module: nn.Module
    stage: Stage


def placed_stages(root: nn.Module, plan: Plan) -> list[Placed]:
    """The modules of a plan's stages, in the order in which they run.

    Raises:
        SequenceParallelConfigError: a glob matches nothing, or a module is matched twice.
    """
    order = {name: index for index, (name, _) in enumerate(root.named_modules())}
    found = [matching_modules(root, stage.modules, "plan stage") for stage in plan.stages]
    layers = {
        name: tuple(int(n) for n in re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)) for part in found for name in part
    }
    # Stages that are listed one behind the other, all with numbers or all without, run in turns.
    runs = itertools.groupby(any(layers[name] for name in part) for part in found)
    turns = [turn for turn, (_, run) in enumerate(runs) for _ in run]
    placed: list[tuple[tuple, Placed]] = []
    for kind, (stage, part) in enumerate(zip(plan.stages, found, strict=True)):
        for name, module in part.items():
            key = (order[name],) if plan.order == "modules" else (turns[kind], layers[name], kind, order[name])
            placed.append((key, Placed(name, module, stage)))
    by_module = sorted((item for _, item in placed), key=lambda item: order[item.name])
    for before, after in itertools.pairwise(by_module):
        if f"{after.name}.".startswith(f"{before.name}."):
            raise SequenceParallelConfigError(
                setting="plan.stages",
                value=after.name,
                why=f"is matched by stage {after.stage.modules!r}, and is (in) {before.name}, matched by stage "
                f"{before.stage.modules!r}",
                remedy="match every module by one stage, and no module inside another stage",
            )
    ordered = [item for _, item in sorted(placed, key=lambda pair: pair[0])]
    for setting, others in (("takes", ordered[1:]), ("gives", ordered[:-1])):
        for item in others:
            if getattr(item.stage, setting) is not None:
                raise SequenceParallelConfigError(
                    setting=f"plan stage {item.stage.modules!r} {setting}",
                    value=getattr(item.stage, setting),
                    why=f"{item.name} is not the {'first' if setting == 'takes' else 'last'} stage, and between stages "
                    f"tokens have the features of plan.tokens",
                    remedy="drop it, or correct plan.order",
                )
    return ordered
