"""The parity cases in a world of ranks, under DeepSpeed, by the calls of a user's script."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from deepspeed_worker import mean_over_ranks
from hf_cases import OPTIMIZER, STEPS, Case, cases
from hf_models import build_model, micro_batch, micro_loss

import dsp_plugin


def train(case: Case, folder: Path) -> dict[str, Any]:
    """The case's losses, of this rank and averaged over ranks; its gradients go to the folder."""
    # Peers seed differently: that they hold one model is then DeepSpeed's and our doing, not the seed's.
    torch.manual_seed(dist.get_rank() % case.size)
    model = build_model(case.family, case.checkpointing)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), **OPTIMIZER), config=case.config()
    )
    replica = engine.sequence_parallel_groups.dp.rank
    losses, local, sent = [], [], 0
    gradients: dict[str, torch.Tensor | None] = {}
    for step in range(STEPS):
        with dsp_plugin.ledger() as log:
            loss = micro_loss(case.batch, engine, micro_batch(case.batch, step, 0, replica))
            engine.backward(loss)
        sent += log.bytes(method=case.method)
        if step == 0:
            found = {name: safe_get_full_grad(p) for name, p in model.named_parameters()}
            gradients = {name: None if g is None else g.detach().float().clone() for name, g in found.items()}
        engine.step()
        local.append(loss.item())
        losses.append(mean_over_ranks(loss.item()))
    if dist.get_rank() == 0:
        torch.save(gradients, folder / f"{case.name}.pt")
    return {"losses": losses, "local": local, "sent": mean_over_ranks(sent)}


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """All parity cases of this world by name."""
    return {case.name: partial(train, case, folder) for case in cases(dist.get_world_size())}
