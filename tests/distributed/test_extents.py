"""What holds during a forward pass holds again where checkpoints run parts of it again, and nowhere else."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpointed import Through, non_reentrant, reentrant
from rerun_models import HEADS, LENGTH, Block, Model, example, loss_of, model, unknown
from torch import Tensor, nn

from dsp_plugin import (
    Plan,
    Region,
    SequenceParallelConfig,
    SequenceParallelGroups,
    Stage,
    UnsupportedError,
    parallelize,
)
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

BOUND = 1e-10


PLAN = Plan(tokens="b s c", stages=(Stage("blocks.*", ("s",), attention="attn", heads=HEADS),))
# Name -> a method, and the plan of the model; None shards the batch.
ROUTES = {
    "ulysses": ("ulysses", None),
    "ring": ("ring", None),
    "lightseq": ("lightseq", None),
    "lasp": ("lasp", None),
    "plan, ulysses": ("ulysses", PLAN),
    "plan, ring": ("ring", PLAN),
}
# Name -> what is checkpointed: attention, the module with it, the block from inside and from outside, the model.
PLACES = {
    "attention": ("core", None, None),
    "its module": (None, "all", None),
    "the block inside": (None, None, "through"),
    "attention in a block": ("core", None, "through"),
    "attention in its module": ("core", "all", None),
}


def sharded(found: Model, route: str) -> Model:
    method, plan = ROUTES[route]
    batch: dict[str, Any] = {"batch": {"x_BnC": 1}, "attention": ["blocks.*.attn"], "gather_output": 1}
    config = SequenceParallelConfig(
        method=method, size=dist.get_world_size(), quiet=True, **({} if plan else {**batch, "positions": None})
    )
    parallelize(found, plan, config=config, groups=SequenceParallelGroups.build(config))
    return found


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


def gradients(found: nn.Module) -> list[Tensor]:
    """Their mean over the ranks, which is what frameworks take."""
    mean = []
    for parameter in found.parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        dist.all_reduce(grad)
        mean.append(grad / dist.get_world_size())
    return mean


def error(found: Model, oracle: Model) -> float:
    expected = [p.grad if p.grad is not None else torch.zeros_like(p) for p in oracle.parameters()]
    scale = max(grad.abs().max().item() for grad in expected)
    return max((a - b).abs().max().item() for a, b in zip(gradients(found), expected, strict=True)) / scale


def _settings(route: str) -> dict[str, bool]:
    return {"linear": route == "lasp", "causal": ROUTES[route][1] is None}


def _inside(route: str) -> dict[tuple[str, str], float]:
    found = {}
    oracle = model(**_settings(route))
    loss_of(oracle(example())).backward()
    for place in PLACES:
        for name, way in (("reentrant", reentrant), ("non-reentrant", non_reentrant)):
            mine = sharded(checkpointed(model(**_settings(route)), place, way), route)
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
        settings, (first, second) = _settings(route), (example(), example(7, seed=2))
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
    mine = sharded(checkpointed(model(**_settings(route)), "attention", unknown), route)
    try:
        mine(example().requires_grad_())
    except UnsupportedError as error:
        return str(error)
    return "taken"


def _unknown_outside(route: str) -> float:
    oracle = model(**_settings(route))
    loss_of(oracle(example())).backward()
    mine = sharded(checkpointed(model(**_settings(route)), "the block inside", unknown), route)
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


def _failing(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise KeyError("in the middle of a pass")


def _outside(route: str) -> dict[str, float]:
    """The largest difference to the unsharded model of parts that are called by themselves."""
    oracle, mine = model(**_settings(route)), sharded(model(**_settings(route)), route)
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
    return found


def _every_outside() -> dict[str, dict[str, float]]:
    return {route: _outside(route) for route in ROUTES}


def test_parts_called_outside_of_a_pass_compute_as_if_unsharded() -> None:
    for found in spawn(_every_outside, 2, timeout=120):
        for route, differences in found.items():
            assert max(differences.values()) < BOUND, (route, differences)


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
    settings, found = _settings(route), {}
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
    mine = checkpointed(model(**_settings(route)), "the block inside", way)
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
