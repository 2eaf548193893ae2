r"""Trains a small language model of linear attention on Python's standard library with DeepSpeed, byte by byte.

    torchrun --nproc-per-node 4 -m dsp_plugin.launch launch/examples/train_linear_deepspeed.py \
        --deepspeed_config configs/deepspeed/linear_lasp_zero1.json

A user's script, which shards nothing: the JSON's "sequence_parallel" section does, by a method and a size. Without the
section the same file trains on one rank or with data parallelism. On a machine without a GPU, set DS_ACCELERATOR=cpu.
"""

from __future__ import annotations

import argparse

import deepspeed
import deepspeed.comm as dist
import torch
from torch.utils.data import Dataset

from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.launch.examples import source_code
from dsp_plugin.launch.examples.deepspeed_training import argument_parser, train
from dsp_plugin.models.linear_lm import LinearLM, LinearLMConfig


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argument_parser(__doc__, steps=200, width=64)
    parser.add_argument("--seq-length", type=int, default=256, help="bytes in a sample")
    parser.add_argument("--samples", type=int, default=2000, help="in an epoch")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--decay", choices=DECAYS, default="gated-delta", help="of the linear layers' states")
    parser.add_argument("--conv", type=int, default=4, help="taps of the convolution of q, k and v; 0 for none")
    parser.add_argument("--softmax-every", type=int, default=0, help="every how many layers one has softmax attention")
    parser.add_argument("--recompute", action="store_true", help="recompute layers in the backward pass")
    parser.add_argument(
        "--tile-tokens", type=int, help="tokens of which the loss has logits at once; all of them if left out"
    )
    return parser.parse_args()


class SourceCode(Dataset[dict[str, torch.Tensor]]):
    """Consecutive bytes of the standard library's source: inputs, and as labels the byte after each."""

    def __init__(self, samples: int, seq_length: int) -> None:
        size = samples * seq_length + 1
        self._text = torch.frombuffer(bytearray(source_code.read(size)[:size]), dtype=torch.uint8).long()
        self._seq_length = seq_length

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._seq_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self._seq_length
        bytes_and_next = self._text[start : start + self._seq_length + 1]
        return {"input_ids": bytes_and_next[:-1], "labels": bytes_and_next[1:]}


def main() -> None:
    """Trains, then writes what was asked for."""
    args = parse_arguments()
    deepspeed.init_distributed()
    model = LinearLM(
        LinearLMConfig(
            width=args.width,
            heads=args.heads,
            layers=args.layers,
            decay=args.decay,
            conv=args.conv,
            softmax_every=args.softmax_every,
            checkpoint=args.recompute,
            tile_tokens=args.tile_tokens,
            seed=args.seed,
        )
    )
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=SourceCode(args.samples, args.seq_length),
        config=str(args.deepspeed_config),
    )
    history = train(engine, loader, args, args.seq_length)
    if dist.get_rank() == 0 and args.metrics_out is not None:
        history.write(args.metrics_out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
