r"""Trains a video diffusion transformer on bouncing digits with Megatron-core alone.

    torchrun --nproc-per-node 8 -m dsp_plugin.launch launch/pretrain_video_core.py --sp-method dsp \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --context-parallel-size 2

The model is `dsp_plugin.models.video_dit.VideoDiT` on Megatron's layers, with its own training loop, Megatron's data
parallelism, optimizer and pipeline schedules. On a machine without a GPU, add --cpu before the script.

The initial weights depend on a parameter's name only, and the batch on the step only, so losses and gradients of runs
with different tensor, pipeline, context and data parallel sizes are comparable; ``--metrics-out`` and ``--dump-grads``
write them down, gradients in the names and the order of rows of `VideoDiT`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from dsp_plugin.launch import core_checkpoint
from dsp_plugin.launch.moving_digits import VOCABULARY, MovingDigits
from dsp_plugin.patches.megatron import video_dit_weights
from dsp_plugin.patches.megatron.video_dit import ParallelVideoDiT, VideoShape, pipeline_seq_length

WORDS_PER_DIGIT = 3
Batch = dict[str, Tensor]
Chunks = list[DistributedDataParallel]


def parse_args() -> argparse.Namespace:
    """The command line, in Megatron's own names where Megatron has one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, default=4, help="space-time layers")
    parser.add_argument("--hidden-size", type=int, default=96)
    parser.add_argument("--num-attention-heads", type=int, default=4)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--canvas", type=int, default=20, help="side of a frame, in pixels")
    parser.add_argument("--patch", type=int, default=4, help="side of a patch, in pixels")
    parser.add_argument("--positions", choices=("rotary", "sinusoidal"), default="rotary")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--train-iters", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--recompute-granularity", choices=("full", "selective"))
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--virtual-pipeline-model-parallel-size", type=int)
    parser.add_argument("--context-parallel-size", type=int, default=1)
    parser.add_argument("--sequence-parallel", action="store_true")
    parser.add_argument("--use-distributed-optimizer", action="store_true")
    parser.add_argument("--metrics-out", type=Path, help="JSON file for the losses")
    parser.add_argument("--tensorboard", type=Path, help="folder for TensorBoard logs")
    parser.add_argument(
        "--dump-grads", type=Path, help="torch file for the gradients of the run's first step, as full tensors"
    )
    core_checkpoint.add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Makes the world of ranks, trains in it, and ends it."""
    args = parse_args()
    dist.init_process_group("nccl")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    run(args)
    dist.destroy_process_group()


def run(args: argparse.Namespace) -> None:
    """Trains, and writes what was asked for."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)

    config = model_config(args)
    chunks = build_model(args, config)
    if args.load is not None:
        core_checkpoint.load_weights(chunks, args.load)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=args.lr,
            weight_decay=args.weight_decay,
            clip_grad=args.clip_grad,
            bf16=args.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=args.use_distributed_optimizer,
        ),
        chunks,
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    videos = MovingDigits(args.global_batch_size * args.train_iters, args.frames, args.canvas, seed=args.seed)

    losses = [] if args.checkpoint is None else core_checkpoint.resume(args.checkpoint, chunks, optimizer)
    first = len(losses)
    started = time.perf_counter()
    for step in range(first, args.train_iters):
        optimizer.zero_grad()
        losses.append(train_step(args, config, chunks, videos, step))
        if step == first and args.dump_grads is not None:
            dump_gradients(args, chunks)
        optimizer.step()
        if is_reporter():
            print(f"step {step + 1}/{args.train_iters} | loss {losses[-1]:.6f}", flush=True)
        if args.checkpoint is not None and args.save_every and (step + 1) % args.save_every == 0:
            core_checkpoint.save(args.checkpoint, chunks, optimizer, losses)
    seconds = time.perf_counter() - started

    if args.save is not None:
        core_checkpoint.save_weights(chunks, args.save)
    if args.metrics_out is not None and is_reporter():
        shape = video_shape(args)
        tokens = shape.frames * shape.patches * args.global_batch_size * (args.train_iters - first)
        metrics = {"losses": losses, "tokens_per_second": tokens / seconds, "world_size": dist.get_world_size()}
        args.metrics_out.write_text(json.dumps(metrics))
    if args.tensorboard is not None and is_reporter():
        log_losses(losses, args.tensorboard)
    dist.barrier()
    parallel_state.destroy_model_parallel()


def log_losses(losses: list[float], folder: Path) -> None:
    """Writes the loss curve for TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for step, loss in enumerate(losses, 1):
            writer.add_scalar("train/loss", loss, step)


def model_config(args: argparse.Namespace) -> TransformerConfig:
    """Shape, parallelism and precision of the model."""
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    pipelined = args.pipeline_model_parallel_size > 1
    interleaved = args.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        recompute_granularity=args.recompute_granularity,
        recompute_method="uniform" if args.recompute_granularity == "full" else None,
        recompute_num_layers=1 if args.recompute_granularity == "full" else None,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        sequence_parallel=args.sequence_parallel,
        pipeline_dtype=dtype if pipelined else None,
        params_dtype=dtype,
        bf16=args.bf16,
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        use_cpu_initialization=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


def video_shape(args: argparse.Namespace) -> VideoShape:
    """Of every video of the run."""
    return VideoShape(args.frames, args.canvas, args.canvas, caption=WORDS_PER_DIGIT, patch=args.patch)


def build_model(args: argparse.Namespace, config: TransformerConfig) -> Chunks:
    """This rank's model chunks (one, or one for each virtual pipeline stage), in Megatron's data parallel wrapper."""
    virtual = args.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in [None] if virtual is None else range(virtual):
        place = {"ignore_virtual": virtual is None, "vp_stage": stage}
        model = ParallelVideoDiT(
            config,
            video_shape(args),
            vocabulary=len(VOCABULARY),
            positions=args.positions,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            vp_stage=stage,
        )
        video_dit_weights.load(model, video_dit_weights.Drawn(model, args.seed))
        model.cuda(torch.cuda.current_device())
        if args.bf16:
            model.bfloat16()
        chunks.append(
            DistributedDataParallel(
                config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    overlap_grad_reduce=False,
                    use_distributed_optimizer=args.use_distributed_optimizer,
                ),
                model,
            )
        )
    return chunks


def microbatches(args: argparse.Namespace, videos: MovingDigits, step: int) -> Iterator[Batch]:
    """This data-parallel rank's part of the global batch of a step; the model cuts out what a rank of it needs."""
    dp_size, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    first = step * args.global_batch_size
    mine = torch.arange(first, first + args.global_batch_size).chunk(dp_size)[dp_rank]
    for indices in mine.split(args.micro_batch_size):
        items = [videos[int(index)] for index in indices]
        yield {name: torch.stack([item[name] for item in items]).cuda() for name in items[0]}


def loss_func(count: int, target: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Megatron's two outputs: this rank's part of the mean squared error over whole videos, and what to report.

    Megatron multiplies the first by the context-parallel size and averages gradients over these ranks, so they add up
    to the gradient of the mean, however unevenly tokens are spread.

    Args:
        count: elements of the whole micro-batch.
        target, velocity: of this rank's tokens.
    """
    loss = (velocity.float() - target).square().sum() / count
    # A copy: the schedule scales the loss in place.
    return loss, loss.detach().double().clone()


def forward_step(batches: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, partial]:
    """One microbatch through one chunk, at the videos' own times and noise (rectified flow)."""
    batch = next(batches)
    video, noise, t = batch["video"], batch["noise"], batch["t"]
    share = t.view(-1, 1, 1, 1, 1)
    output = model(share * video + (1 - share) * noise, t, batch["labels"])
    target = model.module.local_target(video - noise)
    return output, partial(loss_func, video.numel(), target)


def train_step(
    args: argparse.Namespace, config: TransformerConfig, chunks: Chunks, videos: MovingDigits, step: int
) -> float:
    """Forward and backward of one global batch, gradients finalized.

    Returns:
        The mean loss over its elements, the same on every rank of the last pipeline stage; 0 elsewhere.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    dp_size = parallel_state.get_data_parallel_world_size()
    count = args.global_batch_size // (args.micro_batch_size * dp_size)
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[microbatches(args, videos, step) for _ in chunks],
        model=chunks,
        num_microbatches=count,
        seq_length=pipeline_seq_length(config, video_shape(args)),
        micro_batch_size=args.micro_batch_size,
        forward_only=False,
    )
    if not reports:
        return 0.0
    total = torch.stack(list(reports)).sum()
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if args.sequence_parallel:
        dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return (total / (count * dp_size)).item()


def is_reporter() -> bool:
    """Whether this rank speaks for all: the first of the last pipeline stage, which has the loss."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def dump_gradients(args: argparse.Namespace, chunks: Chunks) -> None:
    """Writes the reduced gradients of all parameters as full tensors, from global rank 0."""
    if args.use_distributed_optimizer:
        gather_gradient_shards(chunks)
    gradients: dict[str, Tensor] = {}
    for chunk in chunks:
        model = chunk.module
        mine = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
        gradients |= video_dit_weights.whole(model, mine)
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        gradients = {}
    stages: list[dict[str, Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(stages, gradients)
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


if __name__ == "__main__":
    main()
