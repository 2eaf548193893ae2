"""The tiled MLP against the whole one: values and every gradient, and what exists, runs and is kept meanwhile."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.tiles.mlp import bytes_of_token, tile_count, tiled

SHAPE, WIDTH, INTERMEDIATE = (2, 13), 6, 10


class Gated(nn.Module):
    """Gated, or not; with biases, or not; calls are counted."""

    def __init__(self, gated: bool = True, bias: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INTERMEDIATE, bias=bias)
        self.gate = self.up if tied else nn.Linear(WIDTH, INTERMEDIATE, bias=bias) if gated else None
        self.down = nn.Linear(INTERMEDIATE, WIDTH, bias=bias)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        wide = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(wide)


class Adapted(nn.Module):
    """A frozen layer and an adapter that learns, as of LoRA."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 3, bias=False), nn.Linear(3, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.b(self.a(x))


def _adapted() -> Gated:
    mlp = Gated()
    for name in ("gate", "up", "down"):
        setattr(mlp, name, Adapted(getattr(mlp, name)))
    return mlp


MLPS = {
    "gated": Gated,
    "not gated, with biases": partial(Gated, gated=False, bias=True),
    "tied": partial(Gated, tied=True),
    "frozen": lambda: Gated().requires_grad_(False),
    "adapters": _adapted,
}


def _made(name: str, dtype: torch.dtype = torch.float64) -> tuple[Gated, Tensor]:
    torch.manual_seed(0)
    return MLPS[name]().to(dtype), torch.randn(*SHAPE, WIDTH, dtype=dtype, requires_grad=True)


def _gradients(mlp: nn.Module, x: Tensor, tiles: int | None) -> tuple[Tensor, list[Tensor | None]]:
    """What is computed, and the gradients of the input and of what learns; parameters' come by `backward`."""
    out = mlp(x) if tiles is None else tiled(mlp, x, mlp, tiles=tiles)
    torch.manual_seed(1)
    given = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    x.grad = None
    mlp.zero_grad()
    out.backward(given)
    return out.detach(), [x.grad, *(parameter.grad for parameter in mlp.parameters())]


def _same(found: Any, wanted: Any, tolerance: float) -> None:
    for one, right in zip(found, wanted, strict=True):
        assert (one is None) == (right is None)
        if right is not None:
            assert one.dtype == right.dtype
            assert (one - right).abs().max() / right.abs().max().clamp(min=1e-30) < tolerance


@pytest.mark.parametrize("tiles", [1, 2, 3, 5, 26, 100])
@pytest.mark.parametrize("name", MLPS)
def test_equals_the_whole_one(name: str, tiles: int) -> None:
    """More tiles than tokens are a tile for each."""
    mlp, x = _made(name)
    out, wanted = _gradients(deepcopy(mlp), x, None)
    found, gradients = _gradients(mlp, x, tiles)
    _same([found, *gradients], [out, *wanted], 1e-10)


def test_fp32() -> None:
    mlp, x = _made("gated", torch.float32)
    out, wanted = _gradients(deepcopy(mlp).double(), x.detach().double().requires_grad_(), None)
    found, gradients = _gradients(mlp, x, 5)
    _same([found.double(), *(g.double() for g in gradients)], [out, *wanted], 1e-5)


def test_gradients_of_bf16_are_summed_wider() -> None:
    """Ones, of which a sum in bf16 would stay at 256."""
    mlp, x = Gated(bias=True).to(torch.bfloat16), torch.randn(512, WIDTH, dtype=torch.bfloat16)
    tiled(mlp, x, mlp, tiles=512).sum().backward()
    assert mlp.down.bias.grad is not None
    assert mlp.down.bias.grad.dtype == torch.bfloat16
    assert mlp.down.bias.grad.tolist() == [512.0] * WIDTH


@pytest.mark.parametrize("learns", ["input", "parameters", "nothing"])
def test_what_needs_a_gradient(learns: str) -> None:
    mlp, x = _made("gated")
    mlp.requires_grad_(learns == "parameters")
    x = x.detach().requires_grad_(learns == "input")
    right = mlp(x)
    found = tiled(mlp, x, mlp, tiles=4)
    assert found.requires_grad == right.requires_grad
    if learns == "nothing":
        _same([found], [right], 1e-10)
        return
    of = [x] if learns == "input" else list(mlp.parameters())
    _same(torch.autograd.grad(found.sum(), of), torch.autograd.grad(right.sum(), of), 1e-10)


def test_a_gradient_of_some_parameters() -> None:
    mlp, x = _made("gated")
    of = [mlp.down.weight]
    found = torch.autograd.grad(tiled(mlp, x, mlp, tiles=4).sum(), of)
    _same(found, torch.autograd.grad(mlp(x).sum(), of), 1e-10)


def test_hooks_on_parameters_fire_once() -> None:
    """Before and after gradients are accumulated, and on the nodes that accumulate them, as frameworks hang theirs."""
    mlp, x = _made("gated")
    fired: Counter[str] = Counter()
    nodes = []
    for name, parameter in mlp.named_parameters():
        parameter.register_hook(lambda grad, name=name: fired.update([f"{name} before"]))
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: fired.update([f"{name} after"]))
        node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
        node.register_hook(lambda *_, name=name: fired.update([f"{name} node"]))
        nodes.append(node)
    tiled(mlp, x, mlp, tiles=4).sum().backward()
    assert set(fired.values()) == {1}
    assert len(fired) == 9


@pytest.mark.parametrize("cached", [True, False])
def test_autocast(cached: bool) -> None:
    """Weights that were cast for the tiles, without a graph, are not what others in the same context then get."""
    mlp, x = _made("gated", torch.float32)

    def run(tiles: int) -> list[Tensor | None]:
        mine = deepcopy(mlp)
        inputs = x.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            out = tiled(mine, inputs, mine, tiles=tiles) + mine(inputs)
        assert out.dtype == torch.bfloat16
        out.sum().backward()
        return [out, inputs.grad, *(parameter.grad for parameter in mine.parameters())]

    _same([x.float() for x in run(4)], [x.float() for x in run(1)], 2e-2)


def test_autocast_left_before_the_backward_pass() -> None:
    mlp, x = _made("gated", torch.float32)
    seen = []
    mlp.down.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = tiled(mlp, x, mlp, tiles=2)
    out.sum().backward()
    out = tiled(mlp, x, mlp, tiles=2)
    with torch.autocast("cpu", torch.bfloat16):
        out.sum().backward()
    assert seen == [torch.bfloat16] * 4 + [torch.float32] * 4


class _Seen(TorchDispatchMode):
    """Operations, and the largest of what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.rows_of_intermediate = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.dim() > 1 and made.shape[-1] == INTERMEDIATE:
                rows = made.shape[:-1].numel()
                # Weights are narrower than tiles are long here.
                self.rows_of_intermediate = max(self.rows_of_intermediate, rows)
        if not func.is_view:
            self.calls[func.name().removeprefix("aten::").partition(".")[0]] += 1
        return result


def test_no_tensor_of_tokens_by_intermediate() -> None:
    mlp, x = _made("gated", torch.float32)
    with _Seen() as seen:
        tiled(mlp, x, mlp, tiles=3).sum().backward()
    assert seen.rows_of_intermediate == 9
    with _Seen() as seen:
        mlp(x).sum().backward()
    assert seen.rows_of_intermediate == 26


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operations(dtype: torch.dtype) -> None:
    """A tile costs those of the MLP, a copy each way, and one sum a parameter; none puts tiles together."""
    mlp, x = _made("gated", dtype)

    def count(tiles: int) -> Counter[str]:
        with _Seen() as seen:
            tiled(mlp, x, mlp, tiles=tiles).backward(torch.ones_like(x))
        mlp.zero_grad()
        x.grad = None
        return seen.calls

    # Forward, forward again, and backward.
    with _Seen() as seen:
        mlp(x).backward(torch.ones_like(x))
    mlp.zero_grad()
    x.grad = None
    whole, of_two, of_three = seen.calls, count(2), count(3)
    of_a_tile = of_three - of_two
    assert of_a_tile["mm"] == 3 + whole["mm"] == 12
    assert of_a_tile["copy_"] == 2
    # The three sums, and x's two gradients.
    assert of_a_tile["add_"] + of_a_tile["add"] == 3 + 1
    assert not {"cat", "zeros", "zero_", "_to_copy"} & set(of_a_tile)
    # With 4 products, 2 activations and the gradient of one: the MLP three times, and what is said above.
    assert sum(of_a_tile.values()) == 12 + (4 + 2 + 1) + 2 + 3 + 1


@pytest.mark.parametrize("within", [True, False])
def test_weights_are_cast_once(within: bool) -> None:
    """Forward and backward, but for a backward pass within autocast, which would keep what was cast to its end."""
    mlp, x = _made("gated", torch.float32)
    with torch.autocast("cpu", torch.bfloat16), _Seen() as forward:
        out = tiled(mlp, x, mlp, tiles=5)
    with torch.autocast("cpu", torch.bfloat16, enabled=within), _Seen() as backward:
        out.sum().backward()
    # Gate and up cast each tile for themselves. Backward also gradients of these, and of weights.
    assert forward.calls["_to_copy"] == 5 * 2 + 3
    assert backward.calls["_to_copy"] == 2 * 5 * 2 + 15 + (15 if within else 3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool) -> None:
    """A stretch that ends with the MLP is not computed to its end again, where checkpointing can stop early."""
    mlp, x = _made("gated")
    first = nn.Linear(WIDTH, WIDTH).double()

    def stretch(x: Tensor, tiles: int | None = 4) -> Tensor:
        hidden = torch.tanh(first(x))
        return hidden + (mlp(hidden) if tiles is None else tiled(mlp, hidden, mlp, tiles=tiles))

    learn = [x, *first.parameters(), *mlp.parameters()]
    right = torch.autograd.grad(stretch(x, None).sum(), learn)
    mlp.calls = 0
    out = checkpoint(stretch, x, use_reentrant=reentrant)
    assert mlp.calls == 4
    for one in learn:
        one.grad = None
    out.sum().backward()
    assert mlp.calls == (12 if reentrant else 8)
    _same([one.grad for one in learn], right, 1e-10)


def test_backward_twice() -> None:
    mlp, x = _made("gated")
    out = tiled(mlp, x, mlp, tiles=4).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)
    _same(torch.autograd.grad(out, x), first, 1e-15)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, x)


def test_changed_input_is_noticed() -> None:
    mlp, x = _made("gated")
    hidden = x * 1
    out = tiled(mlp, hidden, mlp, tiles=4).sum()
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_refused_derivatives() -> None:
    mlp, x = _made("gated")
    (grad,) = torch.autograd.grad(tiled(mlp, x, mlp, tiles=2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()
    with pytest.raises(UnsupportedError, match=r"a tiled MLP.*backward"):
        torch.func.grad(lambda x: tiled(mlp, x, mlp, tiles=2).sum())(x)


def test_nothing_is_left() -> None:
    """Of the MLP's own tensors, at once: frameworks free and fill parameters around the backward pass."""
    mlp, x = _made("gated", torch.bfloat16)
    aliases: list[Any] = []
    mlp.down.register_forward_pre_hook(lambda module, args: aliases.append(weakref.ref(module.weight)))
    gc.disable()
    try:
        tiled(mlp, x, mlp, tiles=2).sum().backward()
        alive = {id(found()) for found in aliases if found() is not None}
    finally:
        gc.enable()
    assert alive == {id(mlp.down.weight)}
    assert type(mlp.down.weight) is nn.Parameter


@pytest.fixture(params=["grad", "no grad"])
def mode(request: pytest.FixtureRequest) -> Iterator[None]:
    with nullcontext() if request.param == "grad" else torch.no_grad():
        yield


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("shape", [(0, 13), (1, 1), (7,)])
def test_few_tokens(shape: tuple[int, ...]) -> None:
    mlp, _ = _made("gated")
    x = torch.randn(*shape, WIDTH, dtype=torch.float64)
    assert torch.allclose(tiled(mlp, x, mlp, tiles=3), mlp(x), rtol=1e-12, atol=1e-12)


def test_count() -> None:
    of_token = bytes_of_token((14336, 14336, 4096), 2)
    assert of_token == 3 * 2 * (2 * 14336 + 4096)
    assert tile_count(131072, of_token, 512 << 20) == 49
    assert tile_count(100, of_token, 512 << 20) == 1
    assert tile_count(100, of_token, 1) == 100
