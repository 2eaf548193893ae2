"""A user's training script: DeepSpeed and plain torch, and no thought of sequence parallelism."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import deepspeed
import torch
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parent))

from causal_lm import CausalLM

LENGTH = 13


class Text(Dataset):
    """Random tokens, some of which are prompt and do not count."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(7)
        self.tokens = torch.randint(31, (count, LENGTH + 1), generator=generator)
        self.prompts = torch.randint(LENGTH - 1, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.tokens[index, 1:].clone()
        labels[: self.prompts[index]] = -100
        return {"input_ids": self.tokens[index, :-1], "position_ids": torch.arange(LENGTH), "labels": labels}


def main() -> None:
    """Trains for one epoch and writes this rank's losses."""
    parser = deepspeed.add_config_arguments(argparse.ArgumentParser())
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = CausalLM()
    engine, _, loader, _ = deepspeed.initialize(
        args=args, model=model, model_parameters=model.parameters(), training_data=Text(12)
    )
    losses = []
    for batch in loader:
        loss = engine(**batch)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    args.out.mkdir(exist_ok=True)
    rank = torch.distributed.get_rank()
    (args.out / f"rank{rank}.json").write_text(json.dumps({"losses": losses, "batch": engine.train_batch_size()}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
