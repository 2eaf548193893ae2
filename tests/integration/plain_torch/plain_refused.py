"""What plain PyTorch scripts get wrong in a world of 4 ranks, 2 to a sequence, and what they hear."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from plain_models import KINDS, loss_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch_training import Case, fully_sharded, shard

from dsp_plugin import (
    SequenceParallelConfig,
    SequenceParallelConfigError,
    SequenceParallelGroups,
    UnsupportedError,
    parallelize,
)

CASE = Case("batch", "ring", 2, "ddp")


def _step(run: nn.Module, model: nn.Module, replica: int, passes: int = 1, seed: int = 0) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(passes):
        loss_of(run(**CASE.batch(step + seed, 0, replica))).backward()
        optimizer.step()
        optimizer.zero_grad()


def averaged_by_nobody() -> None:
    model = CASE.build()
    groups = shard(CASE, model)
    _step(model, model, groups.dp.rank)


def averaged_by_hand() -> None:
    """Is right."""
    model = CASE.build()
    groups = shard(CASE, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model(**CASE.batch(0, 0, groups.dp.rank))).backward()
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    optimizer.step()


def ddp_over_replicas() -> None:
    model = CASE.build()
    groups = shard(CASE, model)
    _step(DistributedDataParallel(model, process_group=groups.dp.group), model, groups.dp.rank)


def ddp_over_one_sequence() -> None:
    model = CASE.build()
    groups = shard(CASE, model)
    _step(DistributedDataParallel(model, process_group=groups.sp.group), model, groups.dp.rank)


def fsdp_over_replicas() -> None:
    model = CASE.build()
    groups = shard(CASE, model)
    fully_sharded(CASE, model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))["dp"])
    _step(model, model, groups.dp.rank)


def fsdp_first_over_replicas() -> None:
    model = CASE.build()
    fully_sharded(CASE, model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))["dp"])
    _step(model, model, shard(CASE, model).dp.rank)


def fsdp_of_what_holds_the_model_over_replicas() -> None:
    """Its parameters belong to a module above the one that is sharded, and are seen at the first step."""
    from torch.distributed.fsdp import fully_shard

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = CASE.build()

        def forward(self, **batch: Any) -> Any:
            return self.inner(**batch)

    outer = Outer()
    groups = shard(CASE, outer.inner)
    fully_shard(outer, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))["dp"])
    _step(outer, outer, groups.dp.rank)


def another_divide_factor() -> None:
    model = CASE.build()
    groups = shard(CASE, model)
    fully_sharded(CASE, model, init_device_mesh("cpu", (4,)))
    model.set_gradient_divide_factor(2.0)
    _step(model, model, groups.dp.rank)


def fsdp1(original: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = CASE.build()
    groups = shard(CASE, model)
    run = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
    _step(run, run, groups.dp.rank)


def tensor_parallel() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = CASE.build()
    groups = shard(CASE, model)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    parallelize_module(model.head, mesh, ColwiseParallel())
    _step(model, model, groups.dp.rank)


def other_samples() -> None:
    model = CASE.build()
    shard(CASE, model)
    _step(DistributedDataParallel(model), model, dist.get_rank())


def other_weights() -> None:
    model = CASE.build()
    with torch.no_grad():
        model.head.weight += dist.get_rank()
    groups = shard(CASE, model)
    _step(model, model, groups.dp.rank)


def other_weights_that_ddp_sends() -> None:
    """Is right."""
    model = CASE.build()
    with torch.no_grad():
        model.head.weight += dist.get_rank()
    groups = shard(CASE, model)
    _step(DistributedDataParallel(model), model, groups.dp.rank)


def other_buffers() -> None:
    model = CASE.build()
    model.scale += dist.get_rank()
    groups = shard(CASE, model)
    fully_sharded(CASE, model, init_device_mesh("cpu", (4,)))
    _step(model, model, groups.dp.rank)


def seeded_by_rank() -> None:
    """Is right: before the first pass anybody may."""
    model = CASE.build()
    groups = shard(CASE, model)
    torch.manual_seed(dist.get_rank())
    _step(DistributedDataParallel(model), model, groups.dp.rank, passes=2)
    states = [torch.empty_like(torch.get_rng_state()) for _ in range(2)]
    dist.all_gather(states, torch.get_rng_state(), group=groups.sp.group)
    assert torch.equal(*states)


def seeded_by_rank_later() -> None:
    model = CASE.build()
    groups = shard(CASE, model)
    run = DistributedDataParallel(model)
    _step(run, model, groups.dp.rank)
    torch.manual_seed(dist.get_rank())
    _step(run, model, groups.dp.rank, seed=1)


def copied() -> None:
    """Is right: a copy, as of averaged weights, is sharded like the model."""
    model = CASE.build()
    groups = shard(CASE, model)
    twin = copy.deepcopy(model)
    wanted, got = (loss_of(m(**CASE.batch(0, 0, groups.dp.rank))).item() for m in (model, twin))
    assert wanted == got


def llama_that_shifts_within_shards() -> None:
    config = SequenceParallelConfig(
        method="ulysses", size=2, attention=["**.self_attn"], batch={"input_ids": 1, "labels": 1}, loss={}, quiet=True
    )
    parallelize(KINDS["llama"].build(), config=config, groups=SequenceParallelGroups.build(config))


RIGHT = (averaged_by_hand, other_weights_that_ddp_sends, seeded_by_rank, copied)
# By what is run, what everyone hears.
WRONG: dict[str, tuple[Callable[[], None], str]] = {
    "averaged by nobody": (averaged_by_nobody, r"gradients that the optimizer .* differ .*DistributedDataParallel"),
    "ddp over replicas": (ddp_over_replicas, r"DistributedDataParallel.process_group.*without rank \d of its sequence"),
    "ddp over one sequence": (ddp_over_one_sequence, r"process_group.*without rank \d that has its part of other"),
    "fsdp over replicas": (fsdp_over_replicas, r"fully_shard\(\w.*mesh.*without rank \d of its sequence.*mesh of all"),
    "fsdp first, over replicas": (fsdp_first_over_replicas, r"fully_shard\(\w.*without rank \d of its sequence"),
    "fsdp above, over replicas": (fsdp_of_what_holds_the_model_over_replicas, r"mesh of parameter .*without rank"),
    "divide factor": (another_divide_factor, r"set_gradient_divide_factor=2\.0.*exact in their mean"),
    "fsdp1": (lambda: fsdp1(False), r"FullyShardedDataParallel.*[Uu]se torch\.distributed\.fsdp\.fully_shard"),
    "fsdp1, original": (lambda: fsdp1(True), r"FullyShardedDataParallel.*[Uu]se torch\.distributed\.fsdp\.fully_shard"),
    "tensor parallel": (tensor_parallel, r"parameter head\.weight='DTensor'.*tensor parallelism"),
    "other samples": (other_samples, r"different samples.*input_ids.*groups\.dp\.size"),
    "other weights": (other_weights, r"not one model: 1 of .*parameter head\.weight.*Seed alike"),
    "other buffers": (other_buffers, r"not one model: 1 of .*buffer scale"),
    "seeded by rank later": (seeded_by_rank_later, r"random numbers of ranks .*pass 2.*groups\.dp\.rank"),
    "llama, described": (llama_that_shifts_within_shards, r"loss\.labels.*shifts its labels itself"),
}


def heard() -> dict[str, str]:
    """What each of the wrong ways ends in on this rank; the right ones must run."""
    found = {}
    for run in RIGHT:
        run()
    for name, (run, _) in WRONG.items():
        try:
            run()
        except (SequenceParallelConfigError, UnsupportedError) as error:
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "nothing"
    return found
