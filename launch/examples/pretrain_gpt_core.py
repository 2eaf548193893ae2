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
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.launch.examples import core_training, source_code
from dsp_plugin.launch.examples.core_training import Batch, Chunks
from dsp_plugin.patches.megatron.linear_specs import hybrid_layer_specs

VOCABULARY = 256
NEWLINE = 10


def parse_args() -> argparse.Namespace:
    """The command line, in Megatron's own names where Megatron has one."""
    parser = core_training.parser(__doc__)
    # Megatron's own default.
    parser.set_defaults(weight_decay=0.01)
    parser.add_argument("--num-query-groups", type=int, default=4)
    parser.add_argument("--linear-decay", choices=DECAYS, help="linear attention of this kind in place of softmax")
    parser.add_argument(
        "--softmax-every", type=int, default=0, help="with --linear-decay, every k-th layer stays softmax attention"
    )
    parser.add_argument("--seq-length", type=int, default=64)
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    parser.add_argument("--window-size", type=int, nargs=2, metavar=("LEFT", "RIGHT"))
    parser.add_argument("--mtp-num-layers", type=int, help="multi-token prediction: further tokens to predict")
    parser.add_argument("--untie-embeddings-and-output-weights", action="store_true")
    parser.add_argument(
        "--mask-newlines", action="store_true", help="newlines carry no loss: token counts become uneven"
    )
    parser.add_argument("--calculate-per-token-loss", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Makes the world of ranks, trains in it, and ends it."""
    args = parse_args()
    with core_training.world(args):
        config = model_config(args)
        chunks = build_model(args, config)
        text = standard_library(args.seq_length, args.global_batch_size * args.train_iters)
        core_training.train(
            args,
            config,
            chunks,
            step=partial(train_step, args, chunks, text),
            gradients=whole_gradients,
            tokens=args.seq_length,
            loss_name="lm loss",
        )


def model_config(args: argparse.Namespace) -> TransformerConfig:
    """Shape, parallelism and precision of the model."""
    common = core_training.model_arguments(args)
    own = {
        "num_query_groups": args.num_query_groups,
        "linear_attention_freq": args.softmax_every or None,
        "linear_num_key_heads": args.num_query_groups,
        "linear_num_value_heads": args.num_attention_heads,
        "linear_key_head_dim": args.hidden_size // args.num_attention_heads,
        "linear_value_head_dim": args.hidden_size // args.num_attention_heads,
        "attention_dropout": args.attention_dropout,
        "window_size": None if args.window_size is None else tuple(args.window_size),
        "mtp_num_layers": args.mtp_num_layers,
        "calculate_per_token_loss": args.calculate_per_token_loss,
    }
    return TransformerConfig(**{**common, **own})


def build_model(args: argparse.Namespace, config: TransformerConfig) -> Chunks:
    """This rank's chunks of the model, with its first weights."""

    def make(pre_process: bool, post_process: bool, vp_stage: int | None) -> GPTModel:
        layer = layer_spec(args, config, vp_stage)
        model = GPTModel(
            config,
            layer,
            vocab_size=VOCABULARY,
            max_sequence_length=args.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type="rope",
            mtp_block_spec=None if args.mtp_num_layers is None else get_gpt_mtp_block_spec(config, layer, False),
            vp_stage=vp_stage,
        )
        initialize_weights(model, args.seed)
        return model

    return core_training.build_chunks(args, config, make)


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
        if tied and hasattr(model, "embedding"):
            # A last stage that predicts further tokens has an embedding of its own, and no use for this.
            continue
        yield "embedding.word_embeddings.weight" if tied else name, parameter


def standard_library(seq_length: int, samples: int) -> Tensor:
    """Consecutive bytes of the standard library's source, a byte more than a sample in a row: ``[samples, s + 1]``."""
    text = source_code.read(samples * (seq_length + 1))
    rows = len(text) // (seq_length + 1)
    return torch.frombuffer(bytearray(text[: rows * (seq_length + 1)]), dtype=torch.uint8).view(rows, -1).long()


def microbatches(args: argparse.Namespace, text: Tensor, step: int) -> Iterator[Batch]:
    """This data-parallel rank's part of the global batch of a step, cut for its context-parallel rank."""
    for rows in (text[core_training.own_samples(args, step) % len(text)]).split(args.micro_batch_size):
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


def train_step(args: argparse.Namespace, chunks: Chunks, text: Tensor, step: int) -> float:
    """Forward and backward of one global batch, gradients finalized.

    Returns:
        The mean loss over its tokens, the same on every rank of the last pipeline stage; 0 elsewhere.
    """
    reports = core_training.run_schedule(
        args,
        chunks,
        forward_step=forward_step,
        batches=partial(microbatches, args, text, step),
        seq_length=args.seq_length,
    )
    if not reports:
        return 0.0
    report = torch.stack(reports).sum(0)
    dist.all_reduce(report, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return (report[0] / report[1]).item()


def whole_gradients(model: GPTModel) -> dict[str, Tensor]:
    """The reduced gradients of a chunk as full tensors, by the names of the unpipelined model."""
    group = parallel_state.get_tensor_model_parallel_group()
    found: dict[str, Tensor] = {}
    for name, parameter in global_parameters(model):
        gradient = parameter.main_grad.clone()
        if getattr(parameter, "tensor_model_parallel", False) and group.size() > 1:
            parts = [torch.empty_like(gradient) for _ in range(group.size())]
            dist.all_gather(parts, gradient, group=group)
            gradient = torch.cat(parts, parameter.partition_dim)
        found[name] = gradient
    return found


if __name__ == "__main__":
    main()
