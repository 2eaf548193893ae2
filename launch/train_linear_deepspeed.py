r"""Trains a small language model of linear attention on Python's standard library with DeepSpeed, byte by byte.

    torchrun --nproc-per-node 4 -m dsp_plugin.launch launch/train_linear_deepspeed.py \
        --deepspeed_config configs/deepspeed/linear_lasp_zero1.json

A user's script, which shards nothing: the JSON's "sequence_parallel" section does, by a method and a size. Without the
section the same file trains on one rank or with data parallelism. On a machine without a GPU, set DS_ACCELERATOR=cpu.
"""

from __future__ import annotations

import argparse
import json
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from torch.utils.data import Dataset

from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.models.linear_lm import LinearLM, LinearLMConfig


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", type=Path, required=True, help="DeepSpeed's JSON; names train_batch_size")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--seq-length", type=int, default=256, help="bytes in a sample")
    parser.add_argument("--samples", type=int, default=2000, help="in an epoch")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--decay", choices=DECAYS, default="gated-delta", help="of the linear layers' states")
    parser.add_argument("--conv", type=int, default=4, help="taps of the convolution of q, k and v; 0 for none")
    parser.add_argument("--softmax-every", type=int, default=0, help="every how many layers one has softmax attention")
    parser.add_argument("--checkpoint", action="store_true", help="recompute layers in the backward pass")
    parser.add_argument("--save", type=Path, help="write a checkpoint to this folder at the end")
    parser.add_argument("--load", type=Path, help="go on from the checkpoint in this folder")
    parser.add_argument("--metrics-out", type=Path, help="write losses and times to this JSON")
    return parser.parse_args()


class SourceCode(Dataset[dict[str, torch.Tensor]]):
    """Consecutive bytes of the standard library's source: inputs, and as labels the byte after each."""

    def __init__(self, samples: int, seq_length: int) -> None:
        size = samples * seq_length + 1
        text = b""
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text += path.read_bytes()
            if len(text) >= size:
                break
        self._text = torch.frombuffer(bytearray(text[:size]), dtype=torch.uint8).long()
        self._seq_length = seq_length

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._seq_length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = index * self._seq_length
        bytes_and_next = self._text[start : start + self._seq_length + 1]
        return {"input_ids": bytes_and_next[:-1], "labels": bytes_and_next[1:]}


@dataclass
class History:
    """What the run records, one entry per optimizer step."""

    tokens_per_step: int
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def tokens_per_second(self) -> float:
        """Of the last step."""
        return self.tokens_per_step / self.seconds[-1]


def mean_over_ranks(value: torch.Tensor) -> float:
    """The mean of a scalar tensor over all ranks."""
    total = value.detach().double().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def train(engine: Any, loader: Any, steps: int, history: History) -> None:
    """Trains for `steps` optimizer steps, going through the data again if it ends first."""
    micro_losses: list[torch.Tensor] = []
    started = time.perf_counter()
    while len(history.loss) < steps:
        for batch in loader:
            loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()})
            engine.backward(loss)
            micro_losses.append(loss.detach())
            finished_step = engine.is_gradient_accumulation_boundary()
            engine.step()
            if not finished_step:
                continue

            history.loss.append(mean_over_ranks(torch.stack(micro_losses).mean()))
            micro_losses.clear()
            now = time.perf_counter()
            history.seconds.append(now - started)
            started = now
            done = len(history.loss)
            if dist.get_rank() == 0 and (done % 25 == 0 or done in (1, steps)):
                rate = history.tokens_per_second()
                print(f"step {done:4d}  loss {history.loss[-1]:.6f}  {rate:,.0f} tokens/s", flush=True)
            if done >= steps:
                return


def main() -> None:
    """Trains, then writes what was asked for."""
    args = parse_arguments()
    batch_size = json.loads(args.deepspeed_config.read_text())["train_batch_size"]
    deepspeed.init_distributed()
    model = LinearLM(
        LinearLMConfig(
            width=args.width,
            heads=args.heads,
            layers=args.layers,
            decay=args.decay,
            conv=args.conv,
            softmax_every=args.softmax_every,
            checkpoint=args.checkpoint,
            seed=args.seed,
        )
    )
    engine, _, loader, _ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        training_data=SourceCode(args.samples, args.seq_length),
        config=str(args.deepspeed_config),
    )
    if args.load is not None:
        engine.load_checkpoint(str(args.load))
    history = History(tokens_per_step=batch_size * args.seq_length)
    train(engine, loader, args.steps, history)

    if args.save is not None:
        engine.save_checkpoint(str(args.save))
    if dist.get_rank() == 0 and args.metrics_out is not None:
        metrics = {"losses": history.loss, "seconds": history.seconds}
        args.metrics_out.parent.mkdir(parents=True, exist_ok=True)
        args.metrics_out.write_text(json.dumps(metrics, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
