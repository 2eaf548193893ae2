r"""Trains a small Llama of Transformers in plain PyTorch, under DDP or FSDP2, on text that is made on the fly.

    torchrun --nproc-per-node 4 launch/examples/train_fsdp.py --fsdp --method ring --size 2

A user's script: what it does for sequence parallelism is `parallelize` in front of ``fully_shard`` or DDP, both over
all ranks, and batches by replica, not by rank. Everything else is the script that it was. With ``--checkpoint`` it
saves by torch's distributed checkpoint, and goes on from there with any number of ranks, method and size, under DDP or
FSDP2. On a machine without a GPU it runs on CPU and gloo.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

from dsp_plugin import (
    METHODS,
    SequenceParallelBatchSampler,
    SequenceParallelConfig,
    SequenceParallelGroups,
    parallelize,
)

WORDS = 64


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--fsdp", action="store_true", help="shard parameters by fully_shard")
    how.add_argument("--ddp", action="store_true", help="replicate them")
    parser.add_argument("--section", type=Path, help="JSON of the settings, in place of --method and --size")
    parser.add_argument(
        "--method", choices=[name for name, m in METHODS.items() if m.kind == "softmax"], default="ring"
    )
    parser.add_argument("--size", type=int, default=1, help="ranks that share a sequence")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--global-batch-size", type=int, default=8, help="samples of an optimizer step")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="samples that a sequence group takes at a time")
    parser.add_argument("--samples", type=int, default=512, help="in an epoch")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--checkpoint", type=Path, help="save here at the end, and go on from here, if there is one")
    parser.add_argument("--metrics-out", type=Path, help="write losses to this JSON")
    return parser.parse_args(given)


class CountedWords(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count on by a step which the first two words tell."""

    def __init__(self, samples: int, seq_length: int) -> None:
        self._samples, self._seq_length = samples, seq_length

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start, step = torch.randint(1, WORDS, (2,), generator=torch.Generator().manual_seed(index))
        tokens = (start + step * torch.arange(self._seq_length)) % WORDS
        return {"input_ids": tokens, "labels": tokens}


def build_model(width: int, seed: int) -> nn.Module:
    """The model, with the same weights on every rank."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def wrap(model: Any, args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Over all ranks, those that share a sequence included: their mean of the gradients is the exact one."""
    if args.ddp:
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def loader(args: argparse.Namespace, groups: SequenceParallelGroups, trained: int) -> DataLoader[dict[str, Any]]:
    """This rank's micro batches, those of the samples that come next."""
    dataset = CountedWords(args.samples, args.seq_length)
    sampler = SequenceParallelBatchSampler(
        len(dataset),
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        groups=groups,
        seed=args.seed,
        trained=trained,
    )
    return DataLoader(dataset, batch_sampler=sampler)


def endless(loader: DataLoader[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Epoch after epoch."""
    while True:
        yield from loader


def held_out(args: argparse.Namespace, groups: SequenceParallelGroups) -> DataLoader[dict[str, Any]]:
    """Samples to evaluate on. Torch's own sampler does, told of replicas where it would count ranks."""
    dataset = CountedWords(args.samples + 4 * groups.dp.size, args.seq_length)
    last = torch.utils.data.Subset(dataset, range(args.samples, len(dataset)))
    sampler: DistributedSampler[Any] = DistributedSampler(
        last, num_replicas=groups.dp.size, rank=groups.dp.rank, shuffle=False
    )
    return DataLoader(last, batch_size=args.micro_batch_size, sampler=sampler)


def mean_over_ranks(value: torch.Tensor) -> float:
    """The mean over replicas, which the ranks of one sequence have alike."""
    total = value.detach().double().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def main() -> None:
    """On the ranks that torchrun started."""
    args = parse_arguments()
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    losses, evaluated = train(args, device)
    if dist.get_rank() == 0 and args.metrics_out is not None:
        args.metrics_out.write_text(json.dumps({"losses": losses, "held_out": evaluated}))
    dist.destroy_process_group()


def train(args: argparse.Namespace, device: torch.device) -> tuple[list[float], float]:
    """Trains, saves, and returns the losses of all steps and of held out samples."""
    section = json.loads(args.section.read_text()) if args.section else {"method": args.method, "size": args.size}
    config = SequenceParallelConfig(**section)
    groups = SequenceParallelGroups.build(config)
    model = build_model(args.width, args.seed).to(device)
    parallelize(model, config=config, groups=groups)
    run = wrap(model, args, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    losses: list[float] = []
    if args.checkpoint is not None and (args.checkpoint / ".metadata").exists():
        losses = load(args.checkpoint, model, optimizer)
    accumulate = args.global_batch_size // (args.micro_batch_size * groups.dp.size)
    batches = endless(loader(args, groups, trained=len(losses) * args.global_batch_size))
    while len(losses) < args.steps:
        step_loss = torch.zeros((), device=device)
        for micro in range(accumulate):
            batch = next(batches)
            if isinstance(run, DistributedDataParallel):
                run.require_backward_grad_sync = micro == accumulate - 1
            else:
                run.set_requires_gradient_sync(micro == accumulate - 1)
            loss = run(**{name: tensor.to(device) for name, tensor in batch.items()}).loss / accumulate
            loss.backward()
            step_loss += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean_over_ranks(step_loss))
        if dist.get_rank() == 0 and (len(losses) % 10 == 0 or len(losses) in (1, args.steps)):
            print(f"step {len(losses):4d}  loss {losses[-1]:.6f}", flush=True)

    if args.checkpoint is not None:
        save(args.checkpoint, model, optimizer, losses)
    run.eval()
    with torch.no_grad():
        found = [run(**{k: v.to(device) for k, v in batch.items()}).loss for batch in held_out(args, groups)]
    evaluated = mean_over_ranks(torch.stack(found).mean())
    if dist.get_rank() == 0:
        print(f"held out    loss {evaluated:.6f}", flush=True)
    return losses, evaluated


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    """Weights and optimizer by their names, whole or in shards, and what is counted. Collective."""
    weights, states = get_state_dict(model, optimizer)
    counted = {"losses": torch.tensor(losses, dtype=torch.float64)}
    dcp.save({"model": weights, "optimizer": states, **counted}, checkpoint_id=folder)


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """The losses of the steps before. Collective; the checkpoint may be of other ranks, and of another wrapper."""
    steps = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata["losses"].size.numel()
    weights, states = get_state_dict(model, optimizer)
    counted = {"losses": torch.zeros(steps, dtype=torch.float64)}
    dcp.load({"model": weights, "optimizer": states, **counted}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    return counted["losses"].tolist()


if __name__ == "__main__":
    main()
