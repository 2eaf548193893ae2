"""A script's own loss, DPO's, of log-probabilities that a sharded model computes in tiles of its rank's tokens."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups, parallelize, token_log_probs
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(150)]

CLASSES, WIDTH, HEADS, LENGTH = 23, 12, 3, 11


class Attention(nn.Module):
    """Causal."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-3, -2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-3, -2).flatten(-2)


class Policy(nn.Module):
    """Returns a number per token, and the entropy weighed in.

    Args:
        tile: tokens of a tile; None for whole logits.
    """

    def __init__(self, tile: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.attn, self.head = nn.Embedding(CLASSES, WIDTH), Attention(), nn.Linear(WIDTH, CLASSES)
        self.tile = tile
        self.double()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        hidden = self.attn(self.embed(input_ids))
        if self.tile is None:
            logs = self.head(hidden).log_softmax(-1)
            found = logs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
            return found - 0.1 * (logs.exp() * logs).sum(-1)
        found, entropy = token_log_probs(
            hidden, self.head.weight, labels, tile_tokens=self.tile, bias=self.head.bias, with_entropy=True
        )
        return found + 0.1 * entropy


def preference(model: nn.Module) -> Tensor:
    """The first row over the second."""
    ids = torch.randint(CLASSES, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    better, worse = model(input_ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous()).sum(1)
    return -F.logsigmoid(0.3 * (better - worse))


def _compare() -> float:
    whole, tiled = Policy(None), Policy(2)
    config = SequenceParallelConfig(
        method="ring",
        size=dist.get_world_size(),
        batch={"input_ids": 1, "labels": 1},
        positions=None,
        attention=["attn"],
        gather_output=1,
    )
    parallelize(tiled, config=config, groups=SequenceParallelGroups.build(config))
    losses = [preference(model) for model in (whole, tiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-11, atol=0)
    for (name, theirs), ours in zip(whole.named_parameters(), tiled.parameters(), strict=True):
        assert ours.grad is not None
        dist.all_reduce(ours.grad)
        ours.grad /= dist.get_world_size()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11, msg=lambda text: f"{name}: {text}")  # noqa: B023
    return losses[1].item()


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.matrix)])
def test_the_loss_and_its_gradients_are_those_of_the_unsharded_model(size: int) -> None:
    assert len(set(spawn(_compare, size, timeout=100.0))) == 1
