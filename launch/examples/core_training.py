"""What scripts that train on Megatron-core alone share: command line, world, model chunks, and the training loop.

A script brings the model, its batches and its loss. Each step reports the mean loss of its global batch; what a run
writes down (``--metrics-out``, ``--dump-grads``) does not depend on the parallel sizes, so runs are comparable.

Functions that the plugin patches are looked up in Megatron's modules when they are called: one process may run several
scripts, with the plugin and without.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import distributed, optimizer, parallel_state, pipeline_parallel, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from torch import Tensor, nn
from torch.utils.data import Dataset

from dsp_plugin.launch.examples import core_checkpoint

Batch = dict[str, Tensor]
Chunks = list[DistributedDataParallel]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments of every script, in Megatron's own names where Megatron has one; a script adds its own."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--num-layers", type=int, default=4)
    found.add_argument("--hidden-size", type=int, default=64)
    found.add_argument("--num-attention-heads", type=int, default=8)
    found.add_argument("--micro-batch-size", type=int, default=1)
    found.add_argument("--global-batch-size", type=int, default=4)
    found.add_argument("--train-iters", type=int, default=3)
    found.add_argument("--lr", type=float, default=1e-3)
    found.add_argument("--weight-decay", type=float, default=0.0)
    found.add_argument("--clip-grad", type=float, default=1.0)
    found.add_argument("--seed", type=int, default=1234)
    found.add_argument("--recompute-granularity", choices=("full", "selective"))
    found.add_argument("--bf16", action="store_true")
    found.add_argument("--tensor-model-parallel-size", type=int, default=1)
    found.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    found.add_argument("--virtual-pipeline-model-parallel-size", type=int)
    found.add_argument("--context-parallel-size", type=int, default=1)
    found.add_argument("--sequence-parallel", action="store_true")
    found.add_argument("--use-distributed-optimizer", action="store_true")
    found.add_argument("--metrics-out", type=Path, help="JSON file for the losses")
    found.add_argument("--tensorboard", type=Path, help="folder for TensorBoard logs")
    found.add_argument(
        "--dump-grads", type=Path, help="torch file for the gradients of the run's first step, as full tensors"
    )
    core_checkpoint.add_arguments(found)
    return found


def model_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What these arguments say to Megatron's `TransformerConfig`: shape, parallelism and precision of the model."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    interleaved = args.virtual_pipeline_model_parallel_size is not None
    return {
        "num_layers": args.num_layers,
        "hidden_size": args.hidden_size,
        "num_attention_heads": args.num_attention_heads,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "recompute_granularity": args.recompute_granularity,
        "recompute_method": "uniform" if args.recompute_granularity == "full" else None,
        "recompute_num_layers": 1 if args.recompute_granularity == "full" else None,
        "tensor_model_parallel_size": args.tensor_model_parallel_size,
        "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": args.virtual_pipeline_model_parallel_size,
        "context_parallel_size": args.context_parallel_size,
        "sequence_parallel": args.sequence_parallel,
        "pipeline_dtype": dtype if args.pipeline_model_parallel_size > 1 else None,
        "params_dtype": dtype,
        "bf16": args.bf16,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "use_cpu_initialization": False,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
    }


@contextmanager
def world(args: argparse.Namespace) -> Iterator[None]:
    """The ranks of a run and Megatron's groups, which end with it; after an error they are left to the launcher."""
    dist.init_process_group("nccl")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    yield
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build_chunks(args: argparse.Namespace, config: Any, make: Callable[..., nn.Module]) -> Chunks:
    """This rank's model chunks (one, or one for each virtual pipeline stage), in Megatron's data parallel wrapper.

    Args:
        make: a chunk with its first weights, from ``pre_process``, ``post_process`` and ``vp_stage``.
    """
    virtual = args.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in [None] if virtual is None else range(virtual):
        place = {"ignore_virtual": virtual is None, "vp_stage": stage}
        model = make(
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            vp_stage=stage,
        )
        model.cuda(torch.cuda.current_device())
        if args.bf16:
            model.bfloat16()
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=args.use_distributed_optimizer,
        )
        chunks.append(DistributedDataParallel(config, settings, model))
    return chunks


def train(
    args: argparse.Namespace,
    config: Any,
    chunks: Chunks,
    *,
    step: Callable[[int], float],
    gradients: Callable[[Any], dict[str, Tensor]],
    tokens: int,
    loss_name: str = "loss",
) -> None:
    """Trains, and writes what was asked for.

    Args:
        args: of `parser`.
        config: Megatron's `TransformerConfig`, which gets the optimizer's hooks.
        chunks: of `build_chunks`.
        step: forward and backward of the global batch of one step, gradients finalized; returns its mean loss.
        gradients: of a chunk's module, by global name, as full tensors; a collective of tensor-parallel ranks.
        tokens: of one sample.
        loss_name: for what is printed.
    """
    if args.load is not None:
        core_checkpoint.load_weights(chunks, args.load)
    chosen = OptimizerConfig(
        optimizer="adam",
        lr=args.lr,
        weight_decay=args.weight_decay,
        clip_grad=args.clip_grad,
        bf16=args.bf16,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=args.use_distributed_optimizer,
    )
    adam = optimizer.get_megatron_optimizer(chosen, chunks)
    config.grad_scale_func = adam.scale_loss
    config.finalize_model_grads_func = distributed.finalize_model_grads

    losses = [] if args.checkpoint is None else core_checkpoint.resume(args.checkpoint, chunks, adam)
    first = len(losses)
    started = time.perf_counter()
    for index in range(first, args.train_iters):
        adam.zero_grad()
        losses.append(step(index))
        if index == first and args.dump_grads is not None:
            dump_gradients(args, chunks, gradients)
        adam.step()
        if is_reporter():
            print(f"step {index + 1}/{args.train_iters} | {loss_name} {losses[-1]:.6f}", flush=True)
        if args.checkpoint is not None and args.save_every and (index + 1) % args.save_every == 0:
            core_checkpoint.save(args.checkpoint, chunks, adam, losses)
    seconds = time.perf_counter() - started

    if args.save is not None:
        core_checkpoint.save_weights(chunks, args.save)
    if args.metrics_out is not None and is_reporter():
        done = tokens * args.global_batch_size * (args.train_iters - first)
        metrics = {"losses": losses, "tokens_per_second": done / seconds, "world_size": dist.get_world_size()}
        args.metrics_out.write_text(json.dumps(metrics))
    if args.tensorboard is not None and is_reporter():
        log_losses(losses, args.tensorboard)


def run_schedule(
    args: argparse.Namespace,
    chunks: Chunks,
    *,
    forward_step: Callable[..., Any],
    batches: Callable[[], Iterator[Batch]],
    seq_length: int,
) -> list[Tensor]:
    """Forward and backward of one global batch, gradients finalized.

    Args:
        forward_step: Megatron's: one microbatch through one chunk.
        batches: this rank's microbatches of the step, from the first one at each call.
        seq_length: from which Megatron makes the shape that crosses a pipeline border.

    Returns:
        What the loss function reported, by microbatch; nothing but on the last pipeline stage.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    reports = pipeline_parallel.get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[batches() for _ in chunks],
        model=chunks,
        num_microbatches=microbatch_count(args),
        seq_length=seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=False,
    )
    return list(reports)


def microbatch_count(args: argparse.Namespace) -> int:
    """Microbatches of one step on each data-parallel rank."""
    count: int = args.global_batch_size // (args.micro_batch_size * parallel_state.get_data_parallel_world_size())
    return count


def own_samples(args: argparse.Namespace, step: int) -> Tensor:
    """Indices of the samples of a step's global batch that belong to this data-parallel rank."""
    first = step * args.global_batch_size
    ranks = parallel_state.get_data_parallel_world_size()
    return torch.arange(first, first + args.global_batch_size).chunk(ranks)[parallel_state.get_data_parallel_rank()]


def microbatches(args: argparse.Namespace, samples: Dataset[dict[str, Tensor]], step: int) -> Iterator[Batch]:
    """This data-parallel rank's part of the global batch of a step, whole: the model cuts out what a rank needs."""
    for indices in own_samples(args, step).split(args.micro_batch_size):
        items = [samples[int(index)] for index in indices]
        yield {name: torch.stack([item[name] for item in items]).cuda() for name in items[0]}


def mean_of_parts(args: argparse.Namespace, reports: list[Tensor]) -> float:
    """The mean loss of a global batch, from each rank's parts of the means of its microbatches; a collective.

    Returns:
        The same on every rank of the last pipeline stage; 0 elsewhere.
    """
    if not reports:
        return 0.0
    total = torch.stack(reports).sum()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if args.sequence_parallel:
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return (total / (microbatch_count(args) * parallel_state.get_data_parallel_world_size())).item()


def is_reporter() -> bool:
    """Whether this rank speaks for all: the first of the last pipeline stage, which has the loss."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def log_losses(losses: list[float], folder: Path) -> None:
    """Writes the loss curve for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step, loss in enumerate(losses, 1):
            writer.add_scalar("train/loss", loss, step)


def dump_gradients(args: argparse.Namespace, chunks: Chunks, gradients: Callable[[Any], Mapping[str, Tensor]]) -> None:
    """Writes the reduced gradients of all parameters as full tensors, from global rank 0; see `train`."""
    if args.use_distributed_optimizer:
        gather_gradient_shards(chunks)
    mine: dict[str, Tensor] = {}
    for chunk in chunks:
        mine |= gradients(chunk.module)
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        mine = {}
    stages: list[dict[str, Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(stages, mine)
    if dist.get_rank() == 0:
        torch.save({name: gradient for stage in stages if stage for name, gradient in stage.items()}, args.dump_grads)


def gather_gradient_shards(chunks: Chunks) -> None:
    """With the distributed optimizer each data-parallel rank holds a shard of a reduced bucket; fetches the others."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for chunk in chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:
                shards = list(bucket.grad_data.chunk(group.size()))
                mine = shards[group.rank()].clone()
                dist.all_gather(shards, mine, group=group)
