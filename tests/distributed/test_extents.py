"""What holds during a forward pass holds again where checkpoints run parts of it again, and nowhere else."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpointed import Through, non_reentrant, reentrant
from rerun_models import (
    BOUND,
    LENGTH,
    ROUTES,
    Block,
    Model,
    error,
    example,
    loss_of,
    model,
    settings_of,
    sharded,
    unknown,
)
from torch import Tensor

from dsp_plugin import (
    SequenceParallelConfig,
    SequenceParallelGroups,
    UnsupportedError,
    parallelize,
)
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

# Name -> what is checkpointed: attention, the module with it, the block from inside and from outside, the model.
PLACES = {
    "attention": ("core", None, None),
    "its module": (None, "all", None),
    "the block inside": (None, None, "through"),
    "attention in a block": ("core", None, "through"),
    "attention in its module": ("core", "all", None),
}


def checkpointed(found: Model, place: str, way: Through) -> Model:
    core, module, block = PLACES[place]
    for part in found.blocks:
        assert isinstance(part, Block)
        if core:
            part.attn.core = way
        if module:
            part.attn.all = way
        if block:
            part.through = way
    return found


def _inside(route: str) -> dict[tuple[str, str], float]:
    found = {}
    oracle = model(**settings_of(route))
    loss_of(oracle(example())).backward()
    for place in PLACES:
        for name, way in (("reentrant", reentrant), ("non-reentrant", non_reentrant)):
            mine = sharded(checkpointed(model(**settings_of(route)), place, way), route)
            # A reentrant checkpoint gives no gradients where nothing that enters needs one.
            loss_of(mine(example().requires_grad_())).backward()
            found[place, name] = error(mine, oracle)
    return found


def _every_route() -> dict[str, dict[tuple[str, str], float]]:
    return {route: _inside(route) for route in ROUTES}


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.matrix)])
def test_checkpoints_inside_routed_modules_run_attention_again_by_the_method(size: int) -> None:
    for found in spawn(_every_route, size, timeout=200):
        for route, errors in found.items():
            assert max(errors.values()) < BOUND, (route, errors)


def _passes() -> dict[str, float]:
    """Two passes in one backward pass; a graph that is retained; a model that is checkpointed whole; inner tensors."""
    found = {}
    for route in ("ring", "plan, ulysses"):
        settings, (first, second) = settings_of(route), (example(), example(7, seed=2))
        oracle = model(**settings)
        (loss_of(oracle(first)) + loss_of(oracle(second))).backward()
        for name, place, way in (
            ("blocks", "the block inside", non_reentrant),
            ("attention", "attention", non_reentrant),
            ("attention, reentrant", "attention", reentrant),
        ):
            mine = sharded(checkpointed(model(**settings), place, way), route)
            (loss_of(mine(first.requires_grad_())) + loss_of(mine(second.requires_grad_()))).backward()
            found[f"{route}, two passes, {name}"] = error(mine, oracle)

        oracle = model(**settings)
        loss = loss_of(oracle(first))
        loss.backward(retain_graph=True)
        loss.backward()
        mine = sharded(checkpointed(model(**settings), "attention", non_reentrant), route)
        loss = loss_of(mine(first))
        loss.backward(retain_graph=True)
        loss.backward()
        found[f"{route}, retained"] = error(mine, oracle)

        oracle = model(**settings)
        loss_of(oracle(first)).backward()
        for name, way in (("reentrant", reentrant), ("non-reentrant", non_reentrant)):
            mine = sharded(model(**settings), route)
            output = way(mine, first.requires_grad_())
            mine(second).sum()
            loss_of(output).backward()
            found[f"{route}, whole, {name}"] = error(mine, oracle)

            # The gradient enters by a tensor that the model's hooks never saw.
            seen: list[Tensor] = []
            mine = sharded(model(**settings), route)
            mine.each = way
            handle = mine.blocks[1].mlp.register_forward_hook(lambda *call, seen=seen: seen.append(call[2]))
            expected = model(**settings)
            expected.blocks[1].mlp.register_forward_hook(lambda *call: call[2].square().sum().backward())
            expected(first)
            mine(first.requires_grad_())
            handle.remove()
            mine(second)
            if seen[0].requires_grad:
                (seen[0].square().sum() * dist.get_world_size()).backward()
                found[f"{route}, inner tensor, {name}"] = error(mine, expected)
    return found


def test_what_is_run_again_belongs_to_the_pass_it_ran_in_first() -> None:
    for found in spawn(_passes, 2, timeout=200):
        assert max(found.values()) < BOUND, found
        assert any("inner tensor" in name for name in found)


def _unknown(route: str) -> str:
    mine = sharded(checkpointed(model(**settings_of(route)), "attention", unknown), route)
    try:
        mine(example().requires_grad_())
    except UnsupportedError as error:
        return str(error)
    return "taken"


def _unknown_outside(route: str) -> float:
    oracle = model(**settings_of(route))
    loss_of(oracle(example())).backward()
    mine = sharded(checkpointed(model(**settings_of(route)), "the block inside", unknown), route)
    output = mine(example().requires_grad_())
    mine(example(7))
    loss_of(output).backward()
    return error(mine, oracle)


def _unknown_ways() -> tuple[list[str], list[float]]:
    return [_unknown(route) for route in ROUTES], [
        _unknown_outside(route) for route in ROUTES if ROUTES[route][1] is None
    ]


def test_checkpoints_of_unknown_kinds_are_exact_around_modules_and_refused_inside() -> None:
    for said, errors in spawn(_unknown_ways, 2, timeout=120):
        assert all("a checkpoint of a kind we do not know" in words for words in said), said
        assert max(errors) < BOUND


def test_what_ends_out_of_order_leaves_nothing_behind() -> None:
    from dsp_plugin.training.extents import Running, entering_again

    passes: Running[str] = Running()
    passes.begin("outer")
    passes.begin("inner")
    again = entering_again(partial(getattr, passes, "now"), runs_first=False)
    assert again() == "inner"
    passes.end()
    assert passes.now == "outer"
    passes.end()
    passes.end()
    assert passes.now is None
    assert again() == "inner"
    assert passes.now is None


class Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise KeyError("in the middle of a backward pass")


class Branching(Model):
    """Its loss may hang on what it returns beside the tokens."""

    def forward(self, x_BnC: Tensor) -> Any:
        found = super().forward(x_BnC)
        return found.detach(), {"aux": [found.square().mean()]}


def _beside(route: str, way: Through) -> dict[str, float]:
    """What a checkpoint runs again of parts outside of a pass, after what holds for a pass was brought back."""
    settings, found = settings_of(route), {}
    oracle, mine = model(**settings), sharded(model(**settings), route)
    for part in (oracle, mine):
        # As many tokens as a rank has of the pass: nothing would notice.
        beside = way(part.blocks[0].attn, example(LENGTH // dist.get_world_size(), seed=5).requires_grad_())
        (loss_of(beside) + loss_of(part(example()))).backward()
    found["in one backward pass"] = error(mine, oracle)

    handle = mine.blocks[0].attn.register_forward_hook(lambda *call: Refusing.apply(call[2]))
    with pytest.raises(KeyError):
        loss_of(mine(example())).backward()
    handle.remove()
    for part in (oracle, mine):
        part.zero_grad()
        loss_of(unknown(part.blocks[0].attn, example(5, seed=5).requires_grad_())).backward()
    found["after a backward pass that failed"] = error(mine, oracle)
    return found


def _other_output() -> float:
    found = []
    for route in (None, "ring"):
        torch.manual_seed(0)
        mine = Branching().double()
        if route:
            sharded(checkpointed(mine, "the block inside", unknown), route)
        mine(example().requires_grad_())[1]["aux"][0].backward()
        found.append(mine)
    return error(found[1], found[0])


def _removed(route: str, way: Through) -> str:
    method, plan = ROUTES[route]
    batch: dict[str, Any] = {"batch": {"x_BnC": 1}, "attention": ["blocks.*.attn"], "gather_output": 1}
    config = SequenceParallelConfig(
        method=method, size=dist.get_world_size(), quiet=True, **({} if plan else {**batch, "positions": None})
    )
    mine = checkpointed(model(**settings_of(route)), "the block inside", way)
    handle = parallelize(mine, plan, config=config, groups=SequenceParallelGroups.build(config))
    loss = loss_of(mine(example().requires_grad_()))
    handle.remove()
    try:
        loss.backward()
    except UnsupportedError as error:
        return str(error)
    return "taken"


def _ends() -> tuple[dict[str, float], list[str]]:
    ways = (reentrant, non_reentrant)
    errors = {
        f"{route}, {way.__name__}, {name}": value
        for route in ("ring", "plan, ulysses")
        for way in ways
        for name, value in _beside(route, way).items()
    }
    errors["through another output"] = _other_output()
    return errors, [_removed(route, way) for route in ("ring", "plan, ulysses") for way in ways]


def test_what_holds_for_a_pass_reaches_no_checkpoint_outside_and_every_one_inside_until_hooks_are_removed() -> None:
    for errors, said in spawn(_ends, 2, timeout=60):
        assert max(errors.values()) < BOUND, errors
        assert all("remove() between forward and backward" in words for words in said), said
