"""What the DeepSpeed scripts beside this file share: arguments, the training loop, and going on from a checkpoint."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch


def argument_parser(description: str | None, *, steps: int, width: int) -> argparse.ArgumentParser:
    """A parser with the arguments of every script, of which it says the length of a run and the width of the model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", type=Path, required=True, help="DeepSpeed's JSON; names train_batch_size")
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and what is drawn")
    parser.add_argument("--checkpoint", type=Path, help="go on from the last checkpoint in this folder, if it has one")
    parser.add_argument("--save-every", type=int, default=0, help="save a checkpoint there every so many steps")
    parser.add_argument("--metrics-out", type=Path, help="write losses and times to this JSON")
    parser.add_argument("--width", type=int, default=width)
    parser.add_argument("--heads", type=int, default=4)
    return parser


@dataclass
class History:
    """What the run records, one entry per optimizer step; those before a restart included."""

    tokens_per_step: int
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, loss: float, seconds: float) -> None:
        """Appends one optimizer step."""
        self.loss.append(loss)
        self.seconds.append(seconds)

    def tokens_per_second(self) -> list[float]:
        """Tokens of the global batch over each step's seconds."""
        return [self.tokens_per_step / seconds for seconds in self.seconds]

    def write(self, path: Path, **further: Any) -> None:
        """Writes losses, times and what is added to a JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"losses": self.loss, "seconds": self.seconds, **further}, indent=1))


def train_batch_size(args: argparse.Namespace) -> int:
    """Samples of one optimizer step, from DeepSpeed's JSON."""
    return int(json.loads(args.deepspeed_config.read_text())["train_batch_size"])


def mean_over_ranks(value: torch.Tensor) -> float:
    """The mean of a scalar tensor over all ranks."""
    total = value.detach().double().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def resume(engine: Any, args: argparse.Namespace, history: History) -> None:
    """Loads the last checkpoint, if there is one, and the history of the steps before it."""
    if args.checkpoint is None or not list(args.checkpoint.glob("latest*")):
        return
    _, state = engine.load_checkpoint(str(args.checkpoint))
    history.loss, history.seconds = list(state["losses"]), list(state["seconds"])
    if dist.get_rank() == 0:
        print(f"going on after step {engine.global_steps} of {args.checkpoint}", flush=True)


def train(
    engine: Any,
    loader: Any,
    args: argparse.Namespace,
    tokens: int,
    on_step: Callable[[History], None] = lambda history: None,
) -> History:
    """Trains until `args.steps` optimizer steps are done, going through the data again if it ends first.

    A run that goes on from a checkpoint takes the batches that it would have taken without a stop.

    Args:
        tokens: of one sample.
        on_step: what else is to be done after each step.
    """
    history = History(tokens_per_step=train_batch_size(args) * tokens)
    resume(engine, args, history)
    micro_losses: list[torch.Tensor] = []
    started = time.perf_counter()
    passed = engine.global_steps * engine.gradient_accumulation_steps()
    for batch in islice(_endless(loader), passed, None):
        if engine.global_steps >= args.steps:
            break
        loss = engine(**{name: tensor.to(engine.device) for name, tensor in batch.items()})
        engine.backward(loss)
        micro_losses.append(loss.detach())
        finished_step = engine.is_gradient_accumulation_boundary()
        engine.step()
        if not finished_step:
            continue

        mean_loss = mean_over_ranks(torch.stack(micro_losses).mean())
        micro_losses.clear()
        now = time.perf_counter()
        history.add(mean_loss, now - started)
        started = now
        step = len(history.loss)
        on_step(history)
        if dist.get_rank() == 0 and (step % 25 == 0 or step in (1, args.steps)):
            print(f"step {step:4d}  loss {mean_loss:.6f}  {history.tokens_per_second()[-1]:,.0f} tokens/s", flush=True)
        if args.checkpoint is not None and args.save_every and step % args.save_every == 0:
            engine.save_checkpoint(
                str(args.checkpoint), client_state={"losses": history.loss, "seconds": history.seconds}
            )
    return history


def _endless(loader: Any) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader
