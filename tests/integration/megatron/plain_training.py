"""One process and no Megatron: the training that parallel runs of the core scripts are compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron_runs import Run
from torch import Tensor, nn

SEED, BATCH, STEPS = 1234, 4, 3


def with_first_weights(model: nn.Module, draw: Callable[[str, torch.Size, int], Tensor]) -> None:
    """Gives every parameter the value that ``draw`` has for its name."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, parameter.shape, SEED))


def train(model: nn.Module, loss_of: Callable[[int], Tensor], dumped: int) -> Run:
    """Steps of Adam, gradients clipped to norm 1; those of step ``dumped`` are kept.

    Args:
        loss_of: of the whole batch of a step.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == dumped:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return Run(losses, gradients, "")
