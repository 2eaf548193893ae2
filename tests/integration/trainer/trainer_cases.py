"""Scripts of Transformers' Trainer as users write them: none knows of sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from script_world import deepspeed_config
from torch.utils.data import Dataset, IterableDataset
from transformers import EvalPrediction, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

VOCABULARY, LONGEST = 67, 21


class Text(Dataset):
    """Random documents of unlike lengths, part of each a prompt that does not count."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(6, LONGEST + 1, (count,), generator=generator).tolist()
        self.tokens = [torch.randint(2, VOCABULARY, (length,), generator=generator) for length in lengths]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.tokens[index].clone()
        labels[: index % 4] = -100
        return {"input_ids": self.tokens[index], "labels": labels}


class Stream(IterableDataset):
    """The same, read in order."""

    def __init__(self, count: int, seed: int) -> None:
        self.text = Text(count, seed)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter([self.text[index] for index in range(len(self.text))])


def padded(samples: list[dict[str, torch.Tensor]], length: int | None = None) -> dict[str, torch.Tensor]:
    """A batch padded behind its tokens, to its longest sample or to a length."""
    length = length or max(len(sample["input_ids"]) for sample in samples)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**sample, "attention_mask": torch.ones_like(sample["input_ids"])} for sample in samples]
    return {
        name: torch.stack(
            [torch.nn.functional.pad(row[name], (0, length - len(row[name])), value=value) for row in rows]
        )
        for name, value in fill.items()
    }


def to_longest(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Batches of one length, as a dispatcher needs them."""
    return padded(samples, LONGEST)


def build_model() -> LlamaForCausalLM:
    """The same weights everywhere, as from a file."""
    set_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Of predictions that are whole rows: shapes and order have to fit."""
    logits, labels = found.predictions, found.label_ids
    if logits.ndim == 3:
        logits = logits.argmax(-1)
    counts = labels[:, 1:] != -100
    weights = np.arange(1, len(labels) + 1)[:, None] * counts
    return {
        "rows": float(len(labels)),
        "right": float(((logits[:, :-1] == labels[:, 1:]) * counts).sum()),
        "in_order": float((weights * labels[:, 1:]).sum()),
    }


def best(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What is kept of the logits."""
    assert logits.shape[:2] == labels.shape
    return logits.argmax(-1)


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
    """A script's own loss, with a penalty on large logits."""
    counts = labels[:, 1:] != -100
    logits = outputs.logits[:, :-1][counts]
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][counts], reduction="sum")
    count = num_items_in_batch if num_items_in_batch is not None else counts.sum()
    return (loss + 1e-3 * logits.square().sum()) / count


@dataclass(frozen=True)
class Script:
    """A Trainer's script.

    Attributes:
        stage: of ZeRO; None for DDP without DeepSpeed.
        arguments: of `TrainingArguments`, beyond what all have.
        trainer: of `Trainer`.
        data: makes the training data.
        save_at: the step whose checkpoint a second trainer goes on from; None for one trainer.
        predict: also ask for predictions.
        evaluate: evaluate at the end.
    """

    stage: int | None = 1
    arguments: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    data: Callable[[], Any] = lambda: Text(22, 0)
    collator: Callable[..., Any] = padded
    save_at: int | None = None
    predict: bool = False
    evaluate: bool = True

    def run(self, folder: Path, section: dict[str, Any] | None) -> dict[str, Any]:
        """Trains, and says what it came to."""
        trainer = self._trainer(folder, section)
        trainer.train()
        logged = trainer.state.log_history
        if self.save_at is not None:
            trainer = self._trainer(folder, section)
            trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{self.save_at}"))
        result: dict[str, Any] = {
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "unbroken": [entry["loss"] for entry in logged if "loss" in entry],
            "norms": [entry["grad_norm"] for entry in logged if "grad_norm" in entry],
            "rates": [entry["learning_rate"] for entry in logged if "learning_rate" in entry],
            "evaluated": [entry["eval_loss"] for entry in logged if "eval_loss" in entry],
            "steps": trainer.state.global_step,
            "epoch": trainer.state.epoch,
            "operations": trainer.state.total_flos,
            "tokens": trainer.state.num_input_tokens_seen,
        }
        if self.evaluate:
            found = trainer.evaluate()
            result["metrics"] = {name: value for name, value in found.items() if "second" not in name}
            result["metrics"].pop("eval_runtime")
            result["metrics"].pop("eval_model_preparation_time", None)
        if self.predict:
            predictions = trainer.predict(Text(7, 5))
            # What stands where the padding is means nothing.
            result["predicted"] = (predictions.predictions * (predictions.label_ids != -100)).tolist()
            result["labelled"] = predictions.label_ids.tolist()
        trainer.save_model(str(folder / "final"))
        return result

    def _trainer(self, folder: Path, section: dict[str, Any] | None) -> Trainer:
        arguments = {
            **({"use_cpu": True} if self.stage is None else {"deepspeed": deepspeed_config(self.stage, section)}),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "logging_steps": 1,
            "learning_rate": 0.3,
            "optim": "sgd",
            "max_grad_norm": 1.0,
            "report_to": "none",
            "disable_tqdm": True,
            "save_strategy": "no",
            **({} if self.save_at is None else {"save_strategy": "steps", "save_steps": self.save_at}),
            **self.arguments,
        }
        return Trainer(
            model=build_model(),
            args=TrainingArguments(output_dir=str(folder), **arguments),
            train_dataset=self.data(),
            eval_dataset=Text(7, 5),
            data_collator=self.collator,
            **self.trainer,
        )


SCRIPTS = {
    "plain": Script(
        stage=1,
        arguments={"eval_strategy": "epoch", "include_num_input_tokens_seen": "all", "warmup_steps": 2},
        trainer={"compute_metrics": accuracy},
    ),
    "by_length": Script(
        stage=2,
        arguments={"train_sampling_strategy": "group_by_length", "optim": "adamw_torch", "learning_rate": 3e-3},
    ),
    "resumed": Script(stage=3, save_at=3),
    "streamed": Script(
        stage=2, arguments={"max_steps": 5}, data=lambda: Stream(22, 1), collator=to_longest, evaluate=False
    ),
    "dispatched": Script(
        arguments={"accelerator_config": {"dispatch_batches": True}}, collator=to_longest, evaluate=False
    ),
    "dropped": Script(arguments={"dataloader_drop_last": True, "accelerator_config": {"even_batches": False}}),
    "own_loss": Script(stage=3, trainer={"compute_loss_func": own_loss}),
    "smoothed": Script(stage=2, arguments={"label_smoothing_factor": 0.2, "average_tokens_across_devices": False}),
    "predicted": Script(
        stage=3,
        arguments={"max_steps": 2, "eval_accumulation_steps": 1},
        trainer={"compute_metrics": accuracy, "preprocess_logits_for_metrics": best},
        predict=True,
    ),
}
"""By name; each is run with and without a section."""
DDP_SCRIPTS = {
    f"ddp_{name}": replace(SCRIPTS[name], stage=None)
    for name in ("plain", "by_length", "resumed", "streamed", "dispatched", "own_loss", "smoothed", "predicted")
}
"""By name; each is run with and without a section that the run is told."""
READ_IN_TRAINING = ("own_loss", "smoothed")
"""Which read logits in training."""
COVERING = ("plain", "resumed", "predicted")
COVERING_DDP = ("ddp_predicted",)
