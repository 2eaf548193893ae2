"""Training as plain PyTorch scripts do it, in a world of ranks, beside the same on one rank without us."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from plain_models import KINDS, loss_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups, parallelize

STEPS, CLIP = 3, 0.5


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        wrap: "ddp" or "fsdp"; "hsdp" over a mesh of two dims; with "first" before the model is sharded, else after.
        accumulate: micro steps of an optimizer step; all but the last without communication.
        offload: whether checkpoints wait in host memory.
        tile: tokens of a tile of the sharded model's head; 0 for none.
    """

    kind: str
    method: str
    size: int
    wrap: str
    accumulate: int = 1
    checkpointed: bool = False
    unused: bool = False
    reshard: bool = True
    bf16: bool = False
    offload: bool = False
    tile: int = 0

    def __str__(self) -> str:
        flags = [name for name in ("checkpointed", "unused", "bf16", "offload") if getattr(self, name)]
        flags += ["kept"] * (not self.reshard) + [f"accumulate{self.accumulate}"] * (self.accumulate > 1)
        flags += [f"tile{self.tile}"] * (self.tile > 0)
        return "-".join([self.kind, self.method, f"sp{self.size}", *self.wrap.split(), *flags])

    def build(self) -> nn.Module:
        """The same model whoever asks, in fp64; in fp32 for bf16."""
        torch.manual_seed(7)
        wanted = {name: True for name in ("checkpointed", "unused") if getattr(self, name)}
        model = KINDS[self.kind].build(**wanted).train()
        return model if self.bf16 else model.double()

    def batch(self, step: int, micro: int, replica: int) -> dict[str, Tensor]:
        """In the model's dtype."""
        dtype = torch.float32 if self.bf16 else torch.float64
        batch = KINDS[self.kind].micro_batch(step, micro, replica)
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}


@dataclass(frozen=True)
class Trained:
    """Losses and clipped gradient norms by step, and the weights after the last."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def shard(case: Case, model: nn.Module) -> SequenceParallelGroups:
    """What a script adds."""
    kind = KINDS[case.kind]
    memory = {"offload": case.offload, "tile_tokens": case.tile or None}
    settings = {**kind.settings, "memory": {**memory, **kind.settings.get("memory", {})}}
    config = SequenceParallelConfig(method=case.method, size=case.size, quiet=True, **settings)
    groups = SequenceParallelGroups.build(config)
    parallelize(model, kind.plan, config=config, groups=groups)
    return groups


def fully_sharded(case: Case, model: nn.Module, mesh: Any) -> None:
    """Layer by layer, and the rest."""
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": case.reshard}
    if case.bf16:
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in KINDS[case.kind].layers(model):
        fully_shard(layer, **settings)
    fully_shard(model, **settings)


def wrapped(case: Case) -> tuple[nn.Module, nn.Module, SequenceParallelGroups]:
    """What a script calls, the model in it, and the groups."""
    model = case.build()
    world = dist.get_world_size()
    if case.wrap.startswith("ddp"):
        groups = shard(case, model) if case.wrap == "ddp" else None
        ddp = DistributedDataParallel(model, find_unused_parameters=case.unused)
        return ddp, model, groups or shard(case, ddp)
    dims = (2, world // 2) if "hsdp" in case.wrap else (world,)
    mesh = init_device_mesh("cpu", dims, mesh_dim_names=("replicate", "shard")[-len(dims) :])
    groups = None if "first" in case.wrap else shard(case, model)
    fully_sharded(case, model, mesh)
    return model, model, groups or shard(case, model)


def train(case: Case) -> Trained:
    """Like a script."""
    run, model, groups = wrapped(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses, norms = [], []
    for step in range(STEPS):
        step_loss = torch.zeros((), dtype=torch.float64)
        for micro in range(case.accumulate):
            last = micro == case.accumulate - 1
            if hasattr(run, "set_requires_gradient_sync"):
                run.set_requires_gradient_sync(last)
            with nullcontext() if last or not hasattr(run, "no_sync") else run.no_sync():
                loss = loss_of(run(**case.batch(step, micro, groups.dp.rank))) / case.accumulate
                loss.backward()
            step_loss += loss.detach().double()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(step_loss)
        losses.append(step_loss.item() / dist.get_world_size())
    return Trained(losses, norms, weights_of(model))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All of them, whole, on every rank."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


@cache
def alone(case: Case, replicas: int) -> Trained:
    """One rank's training on the batches of all replicas, by torch alone."""
    model = case.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    losses, norms = [], []
    for step in range(STEPS):
        step_loss = 0.0
        for micro in range(case.accumulate):
            for replica in range(replicas):
                loss = loss_of(model(**case.batch(step, micro, replica))) / (case.accumulate * replicas)
                loss.backward()
                step_loss += loss.item()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step_loss)
    return Trained(losses, norms, {name: p.detach() for name, p in model.named_parameters()})


def errors(cases: list[Case]) -> dict[str, dict[str, float]]:
    """Of every case, how far it is off relative to the run alone."""
    found = {}
    for case in cases:
        exact, got = alone(case, dist.get_world_size() // case.size), train(case)
        scale = {name: weight.abs().max() for name, weight in exact.weights.items()}
        found[str(case)] = {
            "loss": max(abs(a / b - 1) for a, b in zip(got.losses, exact.losses, strict=True)),
            "norm": max(abs(a / b - 1) for a, b in zip(got.norms, exact.norms, strict=True)),
            "weights": max(
                float((got.weights[name] - weight).abs().max() / scale[name]) for name, weight in exact.weights.items()
            ),
        }
    return found
