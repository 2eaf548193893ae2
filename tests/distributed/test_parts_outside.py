"""Parts of a model that are called outside of a pass, after one ended in any way, compute as if unsharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpointed import Through, non_reentrant, reentrant, whole
from rerun_models import BOUND, HEADS, LENGTH, ROUTES, Model, error, example, loss_of, model, settings_of, sharded
from torch import Tensor, nn

from dsp_plugin import Plan, Region, SequenceParallelConfig, SequenceParallelGroups, Stage, parallelize
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]


def _failing(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise KeyError("in the middle of a pass")


def _interrupted(*call: object) -> None:
    # As Ctrl-C does, at a place where nothing of torch's cleans up.
    raise KeyboardInterrupt


def _outside(route: str) -> dict[str, float]:
    """The largest difference to the unsharded model of parts that are called by themselves."""
    oracle, mine = model(**settings_of(route)), sharded(model(**settings_of(route)), route)
    found = {}

    def compare(when: str) -> None:
        for length in (LENGTH, LENGTH // 2, 7):
            x = example(length, seed=3)
            for name, part in (
                ("attention", lambda m, x: m.blocks[0].attn(x)),
                ("attention of the last block", lambda m, x: m.blocks[1].attn(x)),
                ("backbone", lambda m, x: m.blocks[1](m.blocks[0](x))),
            ):
                difference = (part(mine, x) - part(oracle, x)).abs().max().item()
                found[f"{when}, {name}, {length} tokens"] = difference

    compare("first")
    output = mine(example())
    compare("after a pass")
    loss_of(output).backward()
    compare("after its backward pass")
    with torch.no_grad():
        mine.eval()(example(8))
    compare("after evaluation")
    handle = mine.blocks[1].attn.register_forward_pre_hook(_failing)
    with pytest.raises(KeyError):
        mine(example())
    handle.remove()
    compare("after a pass that failed")
    mine.train()
    for where, hooked in (
        ("attention", mine.blocks[1].attn.register_forward_pre_hook),
        ("its pre-hooks", mine.register_forward_pre_hook),
        ("its hooks", mine.register_forward_hook),
    ):
        handle, random = hooked(_interrupted), torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt):
            mine(example())
        handle.remove()
        compare(f"after a pass that was interrupted in {where}")
        found[f"interrupted in {where}, random numbers"] = float((torch.get_rng_state() != random).sum())
        found[f"the pass after it, {where}"] = (mine(example()) - oracle(example())).abs().max().item()
    return found


def _every_outside() -> dict[str, dict[str, float]]:
    return {route: _outside(route) for route in ROUTES}


def test_parts_called_outside_of_a_pass_compute_as_if_unsharded() -> None:
    for found in spawn(_every_outside, 2, timeout=120):
        for route, differences in found.items():
            assert max(differences.values()) < BOUND, (route, differences)


def _by_themselves(way: Through, around: Through) -> dict[str, float]:
    """Stages that are driven one by one, in two passes, and beside them a part that is none of either."""
    oracle, mine = model(causal=False), sharded(model(causal=False), "plan, ulysses")
    found, losses = {}, []
    for part in (oracle, mine):
        tokens = [example(LENGTH, seed=1), example(7, seed=2)]
        outputs = [around(part.blocks[1], around(part.blocks[0], x.requires_grad_())) for x in tokens]
        # As many tokens as a rank has of a pass: nothing would notice.
        beside = way(part.blocks[0].attn, example(LENGTH // dist.get_world_size(), seed=5).requires_grad_())
        loss = loss_of(outputs[0]) + loss_of(outputs[1]) + loss_of(beside)
        loss.backward()
        losses.append(loss.item())
    found["loss"] = abs(losses[0] - losses[1])
    found["gradients"] = error(mine, oracle)
    handle = mine.blocks[0].mlp.register_forward_hook(_interrupted)
    with pytest.raises(KeyboardInterrupt):
        mine.blocks[0](example())
    handle.remove()
    found["after one was interrupted"] = (
        (mine.blocks[0].attn(example(5)) - oracle.blocks[0].attn(example(5))).abs().max().item()
    )
    return found


def _every_way_by_themselves() -> dict[str, dict[str, float]]:
    ways = (whole, reentrant, non_reentrant)
    return {
        f"{way.__name__} beside, stages {around.__name__}": _by_themselves(way, around)
        for way in ways
        for around in ways
    }


def test_stages_driven_by_themselves_keep_their_pass_to_themselves() -> None:
    for found in spawn(_every_way_by_themselves, 2, timeout=120):
        for way, errors in found.items():
            assert max(errors.values()) < BOUND, (way, errors)


class Bordered(nn.Module):
    """Tokens enter and leave sharding at the borders of ``body``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Model(causal=False)
        self.before = self.behind = False

    def forward(self, x_BnC: Tensor) -> Tensor:
        if self.before:
            x_BnC = self.body.blocks[0](x_BnC)
        x_BnC = self.body(x_BnC)
        return self.body.blocks[1](x_BnC) if self.behind else x_BnC


def _bordered() -> dict[str, float]:
    found = {}
    plan = Plan(
        tokens="b s c",
        stages=(Stage("body.blocks.*", ("s",), attention="attn", heads=HEADS),),
        region=Region("body", tokens="x_BnC"),
    )
    for before, behind in ((False, False), (True, False), (False, True), (True, True)):
        torch.manual_seed(0)
        oracle = Bordered().double()
        torch.manual_seed(0)
        mine = Bordered().double()
        config = SequenceParallelConfig(method="ulysses", size=dist.get_world_size(), quiet=True)
        parallelize(mine, plan, config=config, groups=SequenceParallelGroups.build(config))
        for part in (oracle, mine):
            part.before, part.behind = before, behind
        for round_ in range(2):
            x = example(LENGTH - round_)
            difference = (mine(x) - oracle(x)).abs().max().item()
            alone = (mine.body.blocks[0](x) - oracle.body.blocks[0](x)).abs().max().item()
            found[f"{before} {behind} {round_}"] = max(difference, alone)
    return found


def test_stages_called_outside_of_their_region_see_whole_tokens() -> None:
    for found in spawn(_bordered, 2, timeout=60):
        assert max(found.values()) < BOUND, found
