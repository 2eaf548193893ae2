"""Dropout in a sharded model: other numbers on every rank, the same when recomputed, and the outside left as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsp_plugin import Axis, Layout, Plan, SequenceParallelConfig, SequenceParallelGroups, Stage, parallelize
from dsp_plugin.comm import all_gather
from dsp_plugin.spawn import spawn

pytestmark = pytest.mark.distributed
TOKENS, WIDTH = 8, 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x_BSC: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BSC).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3 if self.training else 0.0)
        return attended.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Drops activations and attention weights; ``recompute`` checkpoints it."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.dropout = Attention(), nn.Dropout(0.5)
        self.recompute: bool | None = None

    def body(self, x_BSC: Tensor) -> Tensor:
        return x_BSC + self.dropout(self.attn(x_BSC))

    def forward(self, x_BSC: Tensor) -> Tensor:
        if self.recompute is None:
            return self.body(x_BSC)
        return checkpoint(self.body, x_BSC, use_reentrant=self.recompute)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x_BSC: Tensor, position_ids: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x_BSC = block(x_BSC)
        return x_BSC


def by_rank(x: Tensor, axis: Axis) -> Tensor:
    return all_gather(x.unsqueeze(0), 0, Layout.of_sizes([1] * axis.size), axis=axis, method="test")


def _dropout(size: int, route: str) -> None:
    extra = {"attention": ("blocks.*.attn",), "batch": {"x_BSC": 1}, "gather_output": 1} if route == "batch" else {}
    config = SequenceParallelConfig(method="ulysses", size=size, **extra)
    groups = SequenceParallelGroups.build(config)
    torch.manual_seed(3)
    x = torch.randn(2, TOKENS, WIDTH).double()
    gradients = {}
    for recompute in (None, False, True):
        torch.manual_seed(4)
        model = Model().double()
        for block in model.blocks:
            block.recompute = recompute
        plan = Plan("b s c", (Stage("blocks.*", ("s",), attention="attn", heads=2),)) if route == "plan" else None
        parallelize(model, plan, config=config, groups=groups)
        torch.manual_seed(5)
        outputs = [model(x.clone().requires_grad_()) for _ in range(2)]
        assert not torch.equal(outputs[0], outputs[1]), "two steps dropped the same"
        dropped = outputs[0].detach() == x
        assert 0.1 < dropped.double().mean() < 0.4, "two blocks drop a quarter of the time"
        first, second = dropped.chunk(2, dim=1)
        assert not torch.equal(first, second), "ranks drop the same of their tokens"
        sum(output.square().sum() for output in outputs).backward()
        gradients[recompute] = [parameter.grad for parameter in model.parameters()]
        states = by_rank(torch.rand(4), groups.sp)
        assert (states == states[0]).all(), "generators outside the region drifted apart"
    for recompute in (False, True):
        for got, expected in zip(gradients[recompute], gradients[None], strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("route", ["plan", "batch"])
@pytest.mark.parametrize("size", [2])
def test_ranks_drop_differently_and_recomputation_drops_alike(size, route):
    spawn(_dropout, size, size, route)
