"""A file of Megatron's arguments, read for what decides about memory: shapes, parallel sizes, recomputation."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any, NoReturn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.patches.megatron.arguments import add_flags

_NUMBERS = (
    *("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups", "kv-channels"),
    *("seq-length", "max-position-embeddings", "micro-batch-size", "vocab-size", "padded-vocab-size"),
    *("make-vocab-size-divisible-by", "tensor-model-parallel-size", "pipeline-model-parallel-size"),
    *("context-parallel-size", "recompute-num-layers", "mtp-num-layers"),
)
_SWITCHES = (
    *("group-query-attention", "swiglu", "disable-bias-linear", "add-qkv-bias", "qk-layernorm"),
    *("untie-embeddings-and-output-weights", "bf16", "fp16", "recompute-activations", "sequence-parallel"),
    *("use-distributed-optimizer", "accumulate-allreduce-grads-in-fp32", "calculate-per-token-loss"),
)
_CHOICES = {
    "position-embedding-type": ("rope", "learned_absolute", "none"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "recompute-granularity": ("full", "selective"),
    "recompute-method": ("uniform", "block"),
}
# What begins so does not change what a rank holds, or is not in what is built here anyway.
_WITHOUT_EFFECT = (
    *("adam-", "async-save", "attention-backend", "attention-softmax-in-fp32", "auto-detect-ckpt-format", "ckpt-"),
    *("clip-grad", "data-", "dataloader-type", "dist-ckpt", "distributed-", "eval-", "exit-", "global-batch-size"),
    *("init-method", "layernorm-epsilon", "load", "log-", "lr", "merge-file", "min-lr", "mock-data", "no-", "norm-"),
    *("num-dataset-builder-threads", "num-workers", "optimizer", "overlap-", "override-opt", "rotary-", "save"),
    *("seed", "sp-", "split", "start-weight-decay", "end-weight-decay", "tensorboard-", "tokenizer-", "train-"),
    *("transformer-impl", "use-checkpoint-args", "use-cpu-initialization", "use-dist-ckpt", "use-flash-attn"),
    *("use-mcore-models", "use-rope-scaling", "use-rotary-position-embeddings", "vocab-file", "wandb-", "weight-decay"),
)
_MUST = ("num_layers", "hidden_size", "num_attention_heads")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SequenceParallelConfigError(
            setting="--model megatron:FILE", why=message, remedy="write the arguments as Megatron's scripts take them"
        )


def read(path: str) -> argparse.Namespace:
    """The arguments in Megatron's names; numbers that are not given are None.

    Raises:
        SequenceParallelConfigError: no such file, an argument without its value, or the shape of no model.
        UnsupportedError: an argument that nobody here knows the memory of.
    """
    try:
        words = shlex.split(Path(path).read_text(), comments=True)
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise SequenceParallelConfigError(
            setting="--model megatron:FILE", value=path, why=str(error), remedy="name a text file of arguments"
        ) from error
    args, others = _parser().parse_known_args(words)
    unknown = [word for word in others if word.startswith("--") and not word[2:].startswith(_WITHOUT_EFFECT)]
    if unknown:
        raise UnsupportedError(
            setting="--model megatron:FILE",
            value=" ".join(unknown),
            why="a dry run does not know what they change of a rank's memory",
            remedy="leave them out, and reckon with what they do",
        )
    missing = [f"--{name.replace('_', '-')}" for name in _MUST if getattr(args, name) is None]
    if args.vocab_size is None and args.padded_vocab_size is None:
        missing.append("--vocab-size")
    if missing:
        raise SequenceParallelConfigError(
            setting="--model megatron:FILE",
            value=path,
            why=f"{', '.join(missing)} must be there to build the model",
            remedy="add them to the file",
        )
    return args


def section(path: str) -> dict[str, Any]:
    """What the file says of sequence parallelism, as in a section; as ``model_ranks`` and ``stages`` what it says else.

    ``model_ranks`` is on how many ranks the model is spread beside the sequence, on ``stages`` of them layer by layer.

    Raises:
        SequenceParallelConfigError, UnsupportedError: see `read`.
    """
    args = read(path)
    size = args.context_parallel_size
    args.context_parallel_size = size or 1
    config = SequenceParallelConfig.from_megatron(args)
    given = {} if config is None else config.model_dump(exclude_unset=True)
    if size is None:
        given.pop("size", None)
    else:
        given["size"] = size
    stages = args.pipeline_model_parallel_size
    return {**given, "model_ranks": args.tensor_model_parallel_size * stages, "stages": stages}


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(allow_abbrev=False, add_help=False)
    for name in _NUMBERS:
        parser.add_argument(f"--{name}", type=int)
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    for name, choices in _CHOICES.items():
        parser.add_argument(f"--{name}", choices=choices)
    add_flags(parser)
    ones = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "micro_batch_size")
    parser.set_defaults(**dict.fromkeys(ones, 1), make_vocab_size_divisible_by=128, normalization="LayerNorm")
    return parser
