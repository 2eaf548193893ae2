"""A model that can be checkpointed in many places, of softmax or linear attention, examples for it, and its shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from checkpointed import Through, whole
from torch import Tensor, nn

from dsp_plugin import Plan, SequenceParallelConfig, SequenceParallelGroups, Stage, parallelize
from dsp_plugin.kernels.convolution import short_convolution
from dsp_plugin.kernels.linear import linear_attention

HEADS, WIDTH, LENGTH = 4, 16, 10
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


def settings_of(route: str) -> dict[str, bool]:
    return {"linear": route == "lasp", "causal": ROUTES[route][1] is None}


def sharded(found: Model, route: str) -> Model:
    method, plan = ROUTES[route]
    batch: dict[str, Any] = {"batch": {"x_BnC": 1}, "attention": ["blocks.*.attn"], "gather_output": 1}
    config = SequenceParallelConfig(
        method=method, size=dist.get_world_size(), quiet=True, **({} if plan else {**batch, "positions": None})
    )
    parallelize(found, plan, config=config, groups=SequenceParallelGroups.build(config))
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
