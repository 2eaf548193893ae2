"""Trains a small GPT with Megatron-core alone, on the text of Python's standard library, byte by byte.

An ordinary Megatron-core script: its own training loop, `GPTModel` with the local layer spec, Megatron's data
parallelism, optimizer and pipeline schedules. It runs on 0.16 and 0.19. With ``--linear-decay`` the model is a hybrid
with layers of linear attention.

The initial weights depend on a parameter's name only, and the batch on the step only, so losses and gradients of runs
with different tensor, pipeline, context and data parallel sizes are comparable; ``--metrics-out`` and ``--dump-grads``
write them down.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sysconfig
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.launch import core_checkpoint
from dsp_plugin.patches.megatron.linear_specs import hybrid_layer_specs

VOCABULARY = 256
NEWLINE = 10
Batch = dict[str, Tensor]


def parse_args() -> argparse.Namespace:
    """The command line, in Megatron's own names where Megatron has one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--num-attention-heads", type=int, default=8)
    parser.add_argument("--num-query-groups", type=int, default=4)
    parser.add_argument("--linear-decay", choices=DECAYS, help="linear attention of this kind in place of softmax")
    parser.add_argument(
        "--softmax-every", type=int, default=0, help="with --linear-decay, every k-th layer stays softmax attention"
    )
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--train-iters", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--clip-grad", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    parser.add_argument("--window-size", type=int, nargs=2, metavar=("LEFT", "RIGHT"))
    parser.add_argument("--recompute-granularity", choices=("full", "selective"))
    parser.add_argument("--mtp-num-layers", type=int, help="multi-token prediction: further tokens to predict")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    parser.add_argument(
        "--mask-newlines", action="store_true", help="newlines carry no loss: token counts become uneven"
    )
    parser.add_argument("--calculate-per-token-loss", action="store_true")
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
    """Trains, and writes what was asked for."""
    args = parse_args()
    dist.init_process_group("nccl")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
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
            clip_grad=args.clip_grad,
            bf16=args.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=args.use_distributed_optimizer,
        ),
        chunks,
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    text = standard_library(args.seq_length, args.global_batch_size * args.train_iters)

    losses = [] if args.checkpoint is None else core_checkpoint.resume(args.checkpoint, chunks, optimizer)
    first = len(losses)
    started = time.perf_counter()
    for step in range(first, args.train_iters):
        optimizer.zero_grad()
        losses.append(train_step(args, chunks, text, step))
        if step == first and args.dump_grads is not None:
            dump_gradients(args, chunks)
        optimizer.step()
        if is_reporter():
            print(f"step {step + 1}/{args.train_iters} | lm loss {losses[-1]:.6f}", flush=True)
        if args.checkpoint is not None and args.save_every and (step + 1) % args.save_every == 0:
            core_checkpoint.save(args.checkpoint, chunks, optimizer, losses)
    seconds = time.perf_counter() - started

    if args.save is not None:
        core_checkpoint.save_weights(chunks, args.save)
    if args.metrics_out is not None and is_reporter():
        tokens = args.seq_length * args.global_batch_size * (args.train_iters - first)
        metrics = {"losses": losses, "tokens_per_second": tokens / seconds, "world_size": dist.get_world_size()}
        args.metrics_out.write_text(json.dumps(metrics))
    if args.tensorboard is not None and is_reporter():
        log_losses(losses, args.tensorboard)
    dist.barrier()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


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
        num_query_groups=args.num_query_groups,
        linear_attention_freq=args.softmax_every or None,
        linear_num_key_heads=args.num_query_groups,
        linear_num_value_heads=args.num_attention_heads,
        linear_key_head_dim=args.hidden_size // args.num_attention_heads,
        linear_value_head_dim=args.hidden_size // args.num_attention_heads,
        hidden_dropout=0.0,
        attention_dropout=args.attention_dropout,
        window_size=None if args.window_size is None else tuple(args.window_size),
        recompute_granularity=args.recompute_granularity,
        recompute_method="uniform" if args.recompute_granularity == "full" else None,
        recompute_num_layers=1 if args.recompute_granularity == "full" else None,
        mtp_num_layers=args.mtp_num_layers,
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
        calculate_per_token_loss=args.calculate_per_token_loss,
        use_cpu_initialization=False,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
    )


def build_model(args: argparse.Namespace, config: TransformerConfig) -> list[DistributedDataParallel]:
    """This rank's model chunks (one, or one for each virtual pipeline stage), in Megatron's data parallel wrapper."""
    virtual = args.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in [None] if virtual is None else range(virtual):
        layer = layer_spec(args, config, stage)
        place = {"ignore_virtual": virtual is None, "vp_stage": stage}
        model = GPTModel(
            config,
            layer,
            vocab_size=VOCABULARY,
            max_sequence_length=args.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            mtp_block_spec=None if args.mtp_num_layers is None else get_gpt_mtp_block_spec(config, layer, False),
            vp_stage=stage,
        )
        initialize_weights(model, args.seed)
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


def layer_spec(args: argparse.Namespace, config: TransformerConfig, stage: int | None) -> Any:
    """One layer for all, or the layers of this stage of a hybrid."""
    if args.linear_decay is None:
        return get_gpt_layer_local_spec()
    return hybrid_layer_specs(config, decay=args.linear_decay, use_transformer_engine=False, vp_stage=stage)


def initialize_weights(model: GPTModel, seed: int) -> None:
    """Draws every matrix from a generator of its own name, whole, and keeps this rank's slice of it."""
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in global_parameters(model):
            if parameter.dim() != 2:
                continue
            sharded = getattr(parameter, "tensor_model_parallel", False)
            shape = list(parameter.shape)
            if sharded:
                shape[parameter.partition_dim] *= tp_size
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            whole = torch.randn(shape, generator=generator) * 0.05
            parameter.copy_(whole.chunk(tp_size, parameter.partition_dim)[tp_rank] if sharded else whole)


def global_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    """The parameters of a chunk under the names they have in the unpipelined model."""
    layers = {f"decoder.layers.{i}.": layer for i, layer in enumerate(model.decoder.layers)}
    for name, parameter in model.named_parameters():
        for prefix, layer in layers.items():
            if name.startswith(prefix):
                name = f"decoder.layers.{layer.layer_number - 1}.{name.removeprefix(prefix)}"
                break
        tied = name == "output_layer.weight" and model.share_embeddings_and_output_weights
        yield "embedding.word_embeddings.weight" if tied else name, parameter


def standard_library(seq_length: int, samples: int) -> Tensor:
    """Consecutive bytes of the standard library's source, a byte more than a sample in a row: ``[samples, s + 1]``."""
    text = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= samples * (seq_length + 1):
            break
    rows = len(text) // (seq_length + 1)
    return torch.frombuffer(bytearray(text[: rows * (seq_length + 1)]), dtype=torch.uint8).view(rows, -1).long()


def microbatches(args: argparse.Namespace, text: Tensor, step: int) -> Iterator[Batch]:
    """This data-parallel rank's part of the global batch of a step, cut for its context-parallel rank."""
    dp_size, dp_rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    first = step * args.global_batch_size
    mine = torch.arange(first, first + args.global_batch_size).chunk(dp_size)[dp_rank]
    for rows in (text[mine % len(text)]).split(args.micro_batch_size):
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        loss_mask = (labels != NEWLINE).float() if args.mask_newlines else torch.ones_like(labels, dtype=torch.float)
        batch = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": torch.arange(args.seq_length).expand_as(tokens).contiguous(),
        }
        yield on_this_cp_rank({name: tensor.cuda() for name, tensor in batch.items()})


def on_this_cp_rank(batch: Batch) -> Batch:
    """The context-parallel slice; 0.19 asks for one argument more than 0.16."""
    accepted = inspect.signature(get_batch_on_this_cp_rank).parameters
    hybrid = {"is_hybrid_cp": False} if "is_hybrid_cp" in accepted else {}
    return get_batch_on_this_cp_rank(batch, cp_group=parallel_state.get_context_parallel_group(), **hybrid)


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's three outputs: summed loss, token count, and what to report."""
    total = (losses.float() * loss_mask).sum()
    count = loss_mask.sum()
    return total, count.int(), torch.stack([total.detach().double(), count.double()])


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, partial]:
    """One microbatch through one chunk."""
    batch = next(batches)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return losses, partial(loss_func, batch["loss_mask"])


def train_step(args: argparse.Namespace, chunks: list[DistributedDataParallel], text: Tensor, step: int) -> float:
    """Forward and backward of one global batch, gradients finalized.

    Returns:
        The mean loss over its tokens, the same on every rank of the last pipeline stage; 0 elsewhere.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    dp_size = parallel_state.get_data_parallel_world_size()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[microbatches(args, text, step) for _ in chunks],
        model=chunks,
        num_microbatches=args.global_batch_size // (args.micro_batch_size * dp_size),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=False,
    )
    if not reports:
        return 0.0
    report = torch.stack(list(reports)).sum(0)
    dist.all_reduce(report, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return (report[0] / report[1]).item()


def is_reporter() -> bool:
    """Whether this rank speaks for all: the first of the last pipeline stage, which has the loss."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )


def dump_gradients(args: argparse.Namespace, chunks: list[DistributedDataParallel]) -> None:
    """Writes the reduced gradients of all parameters as full tensors, from global rank 0."""
    if args.use_distributed_optimizer:
        gather_gradient_shards(chunks)
    tp_group = parallel_state.get_tensor_model_parallel_group()
    tp_size = parallel_state.get_tensor_model_parallel_world_size()
    gradients: dict[str, Tensor] = {}
    for chunk in chunks:
        for name, parameter in global_parameters(chunk.module):
            gradient = parameter.main_grad.clone()
            if getattr(parameter, "tensor_model_parallel", False) and tp_size > 1:
                parts = [torch.empty_like(gradient) for _ in range(tp_size)]
                dist.all_gather(parts, gradient, group=tp_group)
                gradient = torch.cat(parts, parameter.partition_dim)
            gradients[name] = gradient
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        gradients = {}
    stages: list[dict[str, Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(stages, gradients)
    if dist.get_rank() == 0:
        torch.save({name: gradient for stage in stages if stage for name, gradient in stage.items()}, args.dump_grads)


def gather_gradient_shards(chunks: list[DistributedDataParallel]) -> None:
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
