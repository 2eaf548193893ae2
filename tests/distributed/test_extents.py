"""What holds during a forward pass holds again where checkpoints run parts of it again, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from checkpointed import Through, non_reentrant, reentrant, whole
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
from dsp_plugin.kernels.convolution import short_convolution
from dsp_plugin.kernels.linear import linear_attention
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

HEADS, WIDTH, LENGTH = 4, 16, 10
BOUND = 1e-10


class Unknown(torch.autograd.Function):
    """Reentrant activation checkpointing as scripts write it for themselves."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            ctx.function(x).backward(grad)
        return None, x.grad


def unknown(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return Unknown.apply(function, x)


class Attention(nn.Module):
    """Softmax attention, or linear attention behind a short convolution; ``core`` runs it, ``all`` the whole module."""

    def __init__(self, linear: bool, causal: bool) -> None:
        super().__init__()
        self.linear, self.causal = linear, causal
        self.core: Through = whole
        self.all: Through = whole
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.taps = nn.Parameter(torch.randn(3 * WIDTH, 3))

    def attend(self, qkv: Tensor) -> Tensor:
        if self.linear:
            q, k, v = short_convolution(qkv, self.taps).unflatten(-1, (3, HEADS, -1)).unbind(-3)
            found = linear_attention(q, k, v)
            assert isinstance(found, Tensor)
            return found.flatten(2)
        q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)

    def body(self, x_BnC: Tensor) -> Tensor:
        return self.out(self.core(self.attend, self.qkv(x_BnC)))

    def forward(self, x_BnC: Tensor) -> Tensor:
        return self.all(self.body, x_BnC)


class Block(nn.Module):
    def __init__(self, linear: bool, causal: bool) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(linear, causal), nn.Linear(WIDTH, WIDTH)
        self.through: Through = whole

    def body(self, x_BnC: Tensor) -> Tensor:
        x_BnC = x_BnC + self.attn(x_BnC)
        return x_BnC + self.mlp(x_BnC).tanh()

    def forward(self, x_BnC: Tensor) -> Tensor:
        return self.through(self.body, x_BnC)


class Model(nn.Module):
    def __init__(self, linear: bool = False, causal: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(linear, causal) for _ in range(2))
        self.each: Through = whole

    def forward(self, x_BnC: Tensor) -> Tensor:
        for block in self.blocks:
            x_BnC = self.each(block, x_BnC)
        return x_BnC


def model(**settings: bool) -> Model:
    torch.manual_seed(0)
    return Model(**settings).double()


def example(length: int = LENGTH, seed: int = 1) -> Tensor:
    return torch.randn(2, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean() + output.sin().mean()


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


@pytest.mark.parametrize("size", [2, 3])
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
    function = len
    assert entering_again(function, runs_first=True) is function
