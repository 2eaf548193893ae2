"""A GPT of Megatron-core by a file of its arguments, to be dry-run: one rank's share of it, as Megatron cuts models."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.patches import cpu, megatron
from dsp_plugin.patches.megatron.argument_file import read


class Stage(nn.Module):
    """What a rank runs of one microbatch: its part of the layers, on what the stage before sent.

    Args:
        model: Megatron's.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, received: Tensor | None = None, **batch: Any) -> Tensor:
        """Hidden states for the next stage, or on the last one the loss of each token."""
        if received is not None:
            self.model.set_input_tensor(received)
        found: Tensor = self.model(attention_mask=None, **batch)
        return found


def subject(
    arguments: str, length: int = 0, *, sharded_by: SequenceParallelConfig
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """This rank's `Stage` with random weights, one microbatch, and how Megatron shards the rest.

    The world must be up: its ranks are tensor, context, data and pipeline parallel as Megatron orders them. The process
    is in CPU mode from then on.

    Args:
        arguments: a file of them.
        length: L, tokens of a sequence, in place of ``--seq-length``.
        sharded_by: its size is the context-parallel size.

    Raises:
        SequenceParallelConfigError: the arguments do not fit each other, or the world.
        UnsupportedError: the method is not one of Megatron's attention, or there is no context parallelism.
    """
    args = read(arguments)
    length = length or args.seq_length or 0
    _check(args, length, sharded_by)
    cpu.install(force=True)
    known = inspect.signature(megatron.install).parameters
    given = {**sharded_by.model_dump(exclude_unset=True), "quiet": True}
    if given.get("memory", {}).get("offload"):
        # The amount is not to be compared with what this machine has.
        given["memory"]["offload"] = True
    megatron.install(**{name: value for name, value in given.items() if name in known})
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=sharded_by.size,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    model = _model(args, length, sharded_by.size)
    return (
        Stage(model),
        _batch(args, length // sharded_by.size),
        {
            "close": _close,
            "replicas": parallel_state.get_data_parallel_world_size(with_context_parallel=True),
            "partitioned": args.use_distributed_optimizer,
            "wide_gradients": args.bf16 or args.accumulate_allreduce_grads_in_fp32,
            # One forward, one backward: a stage begins with a forward pass for itself and for each stage behind it.
            "in_flight": args.pipeline_model_parallel_size - stage,
        },
    )


def _model(args: argparse.Namespace, length: int, ranks: int) -> nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    built: nn.Module = GPTModel(
        _config(args, ranks),
        get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization),
        vocab_size=_vocabulary(args),
        max_sequence_length=max(length, args.max_position_embeddings or 0),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type or "learned_absolute",
    )
    return built


def _config(args: argparse.Namespace, ranks: int) -> Any:
    from megatron.core.transformer import TransformerConfig

    dtype = torch.get_default_dtype()
    optional = ("ffn_hidden_size", "kv_channels", "recompute_granularity", "recompute_method", "recompute_num_layers")
    given = {name: getattr(args, name) for name in optional if getattr(args, name) is not None}
    if args.recompute_activations:
        given["recompute_granularity"] = "selective"
    if given.get("recompute_granularity") == "full":
        given = {"recompute_method": "uniform", "recompute_num_layers": 1, **given}
    if args.group_query_attention:
        given["num_query_groups"] = args.num_query_groups
    if args.swiglu:
        given |= {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    return TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        normalization=args.normalization,
        qk_layernorm=args.qk_layernorm,
        add_bias_linear=not args.disable_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=ranks,
        sequence_parallel=args.sequence_parallel,
        calculate_per_token_loss=args.calculate_per_token_loss,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        **given,
    )


def _batch(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """What forward takes on this rank: [B, n] of token ids, and [n, B, C] of what the stage before sends."""
    from megatron.core import parallel_state

    shape = (args.micro_batch_size, tokens)
    ids = torch.randint(_vocabulary(args), shape)
    batch: dict[str, Any] = {"input_ids": ids, "position_ids": torch.arange(tokens).expand(shape).contiguous()}
    if parallel_state.is_pipeline_last_stage():
        batch["labels"] = ids.clone()
    if not parallel_state.is_pipeline_first_stage():
        rows = tokens // args.tensor_model_parallel_size if args.sequence_parallel else tokens
        batch["received"] = torch.randn(rows, args.micro_batch_size, args.hidden_size, requires_grad=True)
    return batch


def _vocabulary(args: argparse.Namespace) -> int:
    if args.padded_vocab_size is not None:
        return int(args.padded_vocab_size)
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    return -(-args.vocab_size // multiple) * multiple


def _close() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    megatron.uninstall()


def _check(args: argparse.Namespace, length: int, config: SequenceParallelConfig) -> None:
    pieces = 2 * config.size * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    if length < 1 or length % pieces:
        raise SequenceParallelConfigError(
            setting="--length",
            value=length,
            why=f"Megatron's ranks hold equal parts, two each in zigzag order: a multiple of {pieces}",
            remedy=f"say --length {max(-(-length // pieces), 1) * pieces}, or --seq-length in the file",
        )
    if config.size == 1:
        raise UnsupportedError(
            setting="size",
            value=1,
            why="without context parallelism attention is Megatron's own, which on a GPU is Transformer Engine's: it "
            "is not here, and the one that is writes out all scores",
            remedy="dry-run --size 2 or more",
        )
    if args.mtp_num_layers:
        raise UnsupportedError(
            setting="--mtp-num-layers",
            value=args.mtp_num_layers,
            why="a dry run does not build the layers of multi-token prediction",
            remedy="leave it out, and reckon with one more layer and one more head for each",
        )
    if args.fp16:
        raise UnsupportedError(
            setting="--fp16", why="the loss scaler reads values of tensors", remedy="dry-run --bf16, of equal size"
        )
