"""Plans that do not fit their model, and models that do not run as their plan says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mistaken_batches import Attention
from mistakes import BATCH, HEADS, LENGTH, WIDTH, Groups, Mistake, config, unsupported, wrong
from torch import Tensor, nn

from dsp_plugin import Plan, SequenceParallelConfigError, Stage, parallelize


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim, self.attn = dim, Attention()

    def forward(self, tokens: Tensor, table: Tensor | None = None) -> Tensor:
        return tokens + tokens.mean(self.dim, keepdim=True)


class Joint(nn.Module):
    """Attends, causally, to all tokens of all frames."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = CausalAttention()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.attn(tokens.flatten(1, 2)).view_as(tokens)


class CausalAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


class Video(nn.Module):
    def __init__(self, order: str = "space time", give: Any = None, table: Tensor | None = None) -> None:
        super().__init__()
        self.space, self.time, self.end, self.joint = Block(2), Block(1), Block(2), Joint()
        self.order, self.give, self.table = order, give, table

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order.split():
            block = self.get_submodule(name)
            if self.give is not None:
                x = block(self.give)
            else:
                x = block(x, self.table) if self.table is not None else block(x)
        return x


SPACE, TIME, END = (Stage(name, (dim,)) for name, dim in (("space", "s"), ("time", "t"), ("end", "s")))


def by_plan(
    groups: Groups,
    *stages: Stage,
    tokens: str = "b t s c",
    model: nn.Module | None = None,
    plan: Plan | None = None,
    **settings: Any,
) -> None:
    settings = {"method": "dsp", **settings}
    if stages:
        plan = Plan(tokens, stages)
    model = model or Video()
    try:
        handle = parallelize(model, plan, config=config(**settings), groups=groups)
    except SequenceParallelConfigError:
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules()), "half sharded"
        raise
    model(torch.zeros(BATCH, LENGTH, LENGTH, WIDTH))
    handle.remove()


def by_reference(groups: Groups, plan: str) -> None:
    parallelize(Video(), config=config(method="dsp", plan=plan), groups=groups)


def planned(*stages: Stage, **how: Any) -> Callable[..., None]:
    return lambda groups: by_plan(groups, *stages, **how)


PLANS: dict[str, Mistake] = {
    "zigzag inside a plan": wrong(
        planned(SPACE, method="ulysses", layout="zigzag"), "layout='zigzag'", "contiguous runs", "Drop layout"
    ),
    "no plan for the model": wrong(by_plan, "plan: no plan is known for", "Video", "Write a Plan"),
    "plan that cannot be imported": wrong(
        by_reference, "plan='no.plans:mine'", "cannot be imported", "package.module:name", plan="no.plans:mine"
    ),
    "plan that is none": wrong(by_reference, "plan='math:pi'", "is a float, not a dsp_plugin.Plan", plan="math:pi"),
    "plan without a match": wrong(
        planned(Stage("blocks.*", ("s",))), "plan stage='blocks.*'", "no module of Video", "space"
    ),
    "plan attention without a match": wrong(
        planned(Stage("space", ("s",), attention="self_attn", heads=4)),
        "plan attention of space='self_attn'",
        "attn.multi",
    ),
    "tokens of another rank": wrong(
        planned(SPACE, tokens="b t h s c"), "tokens of space='b t h s c'", "5 dims", "(2, 8, 8, 32)", "memory order"
    ),
    "tokens by a wrong name": wrong(
        planned(Stage("space", ("s",), tokens="hidden")), "plan of space='hidden'", "takes tokens, table"
    ),
    "tokens by a place too far": wrong(
        planned(Stage("space", ("s",), tokens=2)), "plan of space=2", "takes tokens, table"
    ),
    "tokens that are no tensor": wrong(
        planned(SPACE, model=Video("space", give=[1])), "plan tokens of space=0", "given list", "one of tokens, table"
    ),
    "table of another rank": wrong(
        planned(Stage("space", ("s",), follows={1: "t d"}), model=Video("space", table=torch.zeros(LENGTH))),
        "plan follows of space, 1='t d'",
        "a tensor (8,) has 1 dims",
        "every dim of the argument",
    ),
    "table of another length": wrong(
        planned(Stage("space", ("s",), follows={"table": "t d"}), model=Video("space", table=torch.zeros(5, 2))),
        "plan follows of space, 'table'='t d'",
        "sizes (5, 2), but t should be 8",
        "pass it whole",
    ),
    "stages in another order": wrong(
        planned(SPACE, TIME, END, model=Video("space end time")),
        "plan.stages='end'",
        "ran where time was due",
        'order to "layers"',
        "register the modules",
    ),
    "a stage that is left out and runs all the same": wrong(
        planned(SPACE, Stage("time", ("t",), when=lambda call: False), END, model=Video("space time end")),
        "plan.stages='time'",
        "ran where end was due",
    ),
    "a first stage that does not run": wrong(
        planned(SPACE, TIME, model=Video("time")), "plan.stages='time'", "ran where space was due"
    ),
    "a last stage that does not run": wrong(
        planned(SPACE, TIME, model=Video("space")), "plan.stages='time'", "never made whole again", "every forward pass"
    ),
    "a module in two stages": wrong(
        planned(SPACE, Stage("sp*", ("t",))), "plan.stages='space'", "stage 'sp*'", "every module by one stage"
    ),
    "a stage inside a stage": wrong(
        planned(SPACE, Stage("space.attn", ("s",))), "plan.stages='space.attn'", "(in) space", "inside another stage"
    ),
    "no dim free": wrong(
        planned(Stage("space", ("s", "t"))), "plan='space'", "no dim can be sharded", "t: ", "s: ", "lower size"
    ),
    "no single dim free for ulysses": wrong(
        planned(SPACE, TIME, method="ulysses"), "no single dim", "s by space", "t by time", "Use method dsp"
    ),
    "causal attention over several sharded dims": unsupported(
        planned(Stage("joint", ("t", "s"), attention="attn", heads=HEADS), model=Video("joint")),
        "is_causal of joint.attn=True",
        "not in global order",
        "drop the mask",
    ),
}
