"""Second derivatives through what moves tensors, and refusals of the derivatives that nothing here has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rerun_models import Model, example, model
from torch import Tensor, nn
from torch.autograd import forward_ad

from dsp_plugin import Axis, Layout, Plan, SequenceParallelConfig, SequenceParallelGroups, Stage, parallelize
from dsp_plugin.comm import all_gather, all_to_all, gather, reduce_scatter, relayout, replicate, ring_hop, split
from dsp_plugin.comm.routes import Route
from dsp_plugin.errors import UnsupportedError
from dsp_plugin.methods import dsp, halo
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

WIDTH, BOUND = 8, 1e-10


class Mix(nn.Module):
    """Attends along one of two token dims, written out: torch can differentiate it as often as one likes."""

    def __init__(self, along: int) -> None:
        super().__init__()
        self.qkv, self.out, self.along = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), along

    def forward(self, x_BTSC: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BTSC.transpose(self.along, 2)).chunk(3, -1)
        mixed = self.out((q @ k.mT / 4).softmax(-1) @ v)
        return x_BTSC + mixed.transpose(self.along, 2)


class Field(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(Mix(1 + number % 2) for number in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def _field(sharded: bool) -> Field:
    torch.manual_seed(0)
    found = Field(4).double()
    if sharded:
        config = SequenceParallelConfig(method="dsp", size=dist.get_world_size(), quiet=True)
        stages = tuple(Stage(f"blocks.{number}", (("t", "s")[number % 2],)) for number in range(4))
        plan = Plan(tokens="b t s c", stages=stages)
        parallelize(found, plan, config=config, groups=SequenceParallelGroups.build(config))
    return found


def _forces(found: Field, mix: float) -> tuple[float, list[Tensor]]:
    """A loss on the gradient of the output by the input, with ``mix`` times the output itself."""
    x = torch.randn(2, 5, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    energy = found(x).square().sum()
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    loss = force.square().sum() + force.sin().sum() + mix * energy
    loss.backward()
    zeros = (torch.zeros_like(p) if p.grad is None else p.grad for p in found.parameters())
    return loss.item(), [x.grad, *zeros] if x.grad is not None else [*zeros]


def _loss_on_gradients() -> list[float]:
    errors = []
    for mix in (0.0, 1.0):
        expected, wanted = _forces(_field(sharded=False), mix)
        loss, gradients = _forces(_field(sharded=True), mix)
        errors.append(abs(loss - expected) / abs(expected))
        for mine, exact in zip(gradients, wanted, strict=True):
            dist.all_reduce(mine)
            mine /= dist.get_world_size()
            errors.append(((mine - exact).abs().max() / exact.abs().max().clamp(min=1e-6)).item())
    return errors


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_loss_on_gradients_is_exact_under_dsp(size: int) -> None:
    for errors in spawn(_loss_on_gradients, size, timeout=100):
        assert max(errors) < BOUND, errors


def _collectives(axis: Axis) -> dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]]:
    """Name -> a collective that is linear, and the shape that this rank gives it."""
    size = axis.size
    layout, zigzag = Layout("contiguous", 2 * size + 1, size), Layout("zigzag", 2 * size + 1, size)
    mine, settings = layout.sizes[axis.rank], {"axis": axis, "method": "test"}
    runs = tuple((range(peer, 2 * size, size),) for peer in range(size))
    # An entry that goes to two ranks, as key/value heads do.
    shared = tuple((range(min(peer, size - 2), min(peer, size - 2) + 2),) for peer in range(size))
    return {
        "all_gather": (lambda x: all_gather(x, 1, layout, **settings), (2, mine, 3)),
        "reduce_scatter": (lambda x: reduce_scatter(x, 1, layout, **settings), (2, layout.length, 3)),
        "ring_hop": (lambda x: ring_hop(x, 1, **settings), (2, 3)),
        "relayout": (lambda x: relayout((x,), 1, layout, zigzag, **settings)[0], (2, mine, 3)),
        "all_to_all": (
            lambda x: all_to_all((x,), (Route(2, 1, runs, tuple((r,) for r in _runs(layout))),), **settings)[0],
            (2, mine, 2 * size),
        ),
        "all_to_all of shared entries": (
            lambda x: all_to_all((x,), (Route(2, 1, shared, tuple((r,) for r in _runs(layout))),), **settings)[0],
            (2, mine, size),
        ),
        "halo": (lambda x: halo.left_halo(x, 2, axis=axis, layout=layout), (2, mine, 3)),
        "switch": (
            lambda x: dsp.switch(x, 1, 2, length=layout.length, groups=_dsp(size)),
            (2, mine, size + 1),
        ),
    }


def _dsp(size: int) -> SequenceParallelGroups:
    return SequenceParallelGroups.build(SequenceParallelConfig(method="dsp", size=size))


def _runs(layout: Layout) -> list[range]:
    starts = [sum(layout.sizes[:rank]) for rank in range(layout.size)]
    return [range(start, start + n) for start, n in zip(starts, layout.sizes, strict=True)]


def _adjoint() -> dict[str, float]:
    """Of ``y = A x`` with dy: ``dx = A' dy``, whose own gradient by dy, for a weight u on dx, must be ``A u``."""
    axis = Axis.of_group("sp", dist.group.WORLD)
    found = {}
    for name, (collective, shape) in _collectives(axis).items():
        generator = torch.Generator().manual_seed(axis.rank)
        x = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        u = torch.randn(shape, dtype=torch.float64, generator=generator)
        y = collective(x)
        dy = torch.randn(y.shape, dtype=torch.float64, generator=generator).requires_grad_()
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        (again,) = torch.autograd.grad(dx, dy, u, create_graph=True)
        found[name] = (again - collective(u)).abs().max().item()
    return found


def test_the_adjoint_of_the_adjoint_of_a_collective_is_the_collective() -> None:
    for found in spawn(_adjoint, 3, timeout=100):
        assert set(found.values()) == {0.0}, found


def _borders() -> dict[str, float]:
    """Of what carries the factor P: a penalty on the gradient of a whole tensor, by weights used on shards."""
    axis = Axis.of_group("sp", dist.group.WORLD)
    layout, settings = Layout("contiguous", 7, axis.size), {"axis": axis, "method": "test"}
    errors = {}
    for name in ("split and gather", "replicate"):
        gradients = []
        for sharded in (True, False):
            generator = torch.Generator().manual_seed(5)
            x, w = (torch.randn(7, 3, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
            text = torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_()
            if sharded:
                start = sum(layout.sizes[: axis.rank])
                part = split(x, 0, layout, **settings)
                beside = replicate(text, **settings) if name == "replicate" else text.detach()
                y = (part * w[start : start + len(part)] * beside).exp()
                whole = gather(y, 0, layout, **settings)
            else:
                whole = (x * w * (text if name == "replicate" else text.detach())).exp()
            entering = (x, text) if name == "replicate" else (x,)
            first = torch.autograd.grad(whole.sin().sum(), entering, create_graph=True)
            loss = sum((g.square().sum() for g in first), torch.zeros(()))
            loss.backward()
            mine = [grad for grad in (x.grad, w.grad, text.grad) if grad is not None]
            if sharded:
                # Of a parameter used on shards frameworks take the mean over ranks; the others are exact everywhere.
                dist.all_reduce(mine[1])
                mine[1] /= axis.size
            gradients.append(mine)
        errors[name] = max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))
    return errors


def test_borders_of_sharded_regions_have_exact_second_derivatives() -> None:
    for errors in spawn(_borders, 3, timeout=60):
        assert max(errors.values()) < BOUND, errors


def _said(run: Callable[[], object]) -> str:
    try:
        run()
    except (UnsupportedError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def _penalty(found: Model, linear_head: bool) -> None:
    x = example().requires_grad_()
    output = found(x)
    # With a linear head no gradient that arrives at attention's output needs a gradient by the model's output.
    score = output.sum() if linear_head else output.square().mean()
    (gradient,) = torch.autograd.grad(score, x, create_graph=True)
    gradient.square().sum().backward()


def _dual(found: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with forward_ad.dual_level():
        found(forward_ad.make_dual(x, torch.ones_like(x)))


def _refused() -> dict[str, str]:
    axis = Axis.of_group("sp", dist.group.WORLD)
    found = {}
    for method in ("ulysses", "ring", "lightseq", "usp", "lasp"):
        mine = model(linear=method == "lasp")
        batch: dict[str, Any] = {"batch": {"x_BnC": 1}, "attention": ["blocks.*.attn"], "gather_output": 1}
        config = SequenceParallelConfig(method=method, size=axis.size, quiet=True, positions=None, **batch)
        parallelize(mine, config=config, groups=SequenceParallelGroups.build(config))
        x = example()
        found[f"{method}, twice"] = _said(lambda mine=mine: _penalty(mine, False))
        found[f"{method}, twice, linear head"] = _said(lambda mine=mine: _penalty(mine, True))
        found[f"{method}, jvp"] = _said(lambda mine=mine, x=x: torch.func.jvp(mine, (x,), (x,)))
        found[f"{method}, grad"] = _said(lambda mine=mine, x=x: torch.func.grad(lambda z: mine(z).sum())(x))
        found[f"{method}, dual"] = _said(lambda mine=mine, x=x: _dual(mine, x))
        found[f"{method}, vmap"] = _said(lambda mine=mine, x=x: torch.func.vmap(mine)(x[None]))
        mine(x).sum().backward()
    for name, (collective, shape) in _collectives(axis).items():
        x = torch.randn(shape, dtype=torch.float64)
        found[f"{name}, jvp"] = _said(lambda f=collective, x=x: torch.func.jvp(f, (x,), (x,)))
        found[f"{name}, vmap"] = _said(lambda f=collective, x=x: torch.func.vmap(f)(x[None]))
        found[f"{name}, dual"] = _said(lambda f=collective, x=x: _dual(f, x))
    return found


def test_other_derivatives_are_refused_in_a_line() -> None:
    for found in spawn(_refused, 2, timeout=100):
        for name, words in found.items():
            if "twice" in name:
                assert "second derivatives were asked of an attention kernel" in words, (name, words)
            else:
                assert words.startswith("UnsupportedError: torch.func and forward-mode derivatives"), (name, words)
            assert "\n" not in words
