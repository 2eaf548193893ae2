"""TRL's trainers, called as its own example scripts call them; what a user adds is the section of the JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from trl_models import chats, completions, judged, preferences, texts

MODEL = "model"


@dataclass(frozen=True)
class Case:
    """One run of a script.

    Attributes:
        trainer: the name of a function below.
        options: arguments of the trainer's config.
        parallel: the section; none where the run decides what is right.
    """

    name: str
    trainer: str
    options: dict[str, Any] = field(default_factory=dict)
    stage: int = 1
    parallel: dict[str, Any] | None = None

    def deepspeed(self) -> dict[str, Any]:
        """The JSON."""
        config: dict[str, Any] = {
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": self.stage, "stage3_gather_16bit_weights_on_model_save": True},
        }
        if self.parallel is not None:
            config["sequence_parallel"] = self.parallel
        return config


def sft(case: Case, folder: Path, arguments: dict[str, Any]) -> Any:
    """SFTTrainer; ``data`` names the data set, ``adapter`` asks for LoRA."""
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    options = dict(case.options)
    data = {"texts": texts, "completions": completions, "chats": chats}[options.pop("data", "texts")]
    adapter = LoraConfig(r=4, target_modules="all-linear") if options.pop("adapter", False) else None
    return SFTTrainer(
        model=str(folder / MODEL),
        args=SFTConfig(**arguments, **options),
        train_dataset=data(),
        eval_dataset=data(5),
        peft_config=adapter,
    )


def dpo(case: Case, folder: Path, arguments: dict[str, Any]) -> Any:
    """DPOTrainer, with a reference model of its own, or the adapted one without its adapter."""
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    options = dict(case.options)
    adapter = LoraConfig(r=4, target_modules="all-linear") if options.pop("adapter", False) else None
    return DPOTrainer(
        model=str(folder / MODEL),
        args=DPOConfig(**arguments, **options),
        train_dataset=preferences(),
        eval_dataset=preferences(3),
        peft_config=adapter,
    )


def kto(case: Case, folder: Path, arguments: dict[str, Any]) -> Any:
    """KTOTrainer."""
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer(
        model=str(folder / MODEL),
        args=KTOConfig(**arguments, **case.options),
        train_dataset=judged(),
        eval_dataset=judged(4),
    )


TRAINERS = {"sft": sft, "dpo": dpo, "kto": kto}


def train(case: Case, folder: Path) -> dict[str, Any]:
    """Trains, evaluates, saves; what the trainer logged."""
    output = folder / f"{case.name}.saved"
    config = folder / f"{case.name}.rank{dist.get_rank()}.config.json"
    config.write_text(json.dumps(case.deepspeed()))
    arguments = {
        "deepspeed": str(config),
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        # By much less Adam would make steps of what rounding leaves of gradients that are zero.
        "adam_epsilon": 1e-4,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
    }
    trainer = TRAINERS[case.trainer](case, folder, arguments)
    trainer.train()
    trainer.save_model(str(output))
    return {"log": trainer.state.log_history, "steps": trainer.state.global_step}


RING = {"method": "ring", "size": 2}
ULYSSES = {"method": "ulysses", "size": 2}
# The scripts; each runs without the section on one rank, and with it on two.
SCRIPTS = (
    Case("sft", "sft", parallel=RING),
    Case("sft-zero3", "sft", {"max_length": 24}, stage=3, parallel=ULYSSES),
    Case("sft-completion", "sft", {"data": "completions"}, parallel=ULYSSES),
    Case("sft-assistant", "sft", {"data": "chats", "assistant_only_loss": True}, parallel=RING),
    Case(
        "sft-wrapped", "sft", {"packing": True, "packing_strategy": "wrapped", "max_length": 24}, stage=2, parallel=RING
    ),
    Case("sft-dft", "sft", {"loss_type": "dft"}, parallel=RING),
    Case("dpo", "dpo", parallel=RING),
    Case("dpo-zero3", "dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}, stage=3, parallel=ULYSSES),
    Case("dpo-precomputed", "dpo", {"precompute_ref_log_probs": True}, parallel=RING),
    Case("kto", "kto", parallel=ULYSSES),
)


def alone(case: Case) -> Case:
    """The same script, with a JSON that lacks the section."""
    return Case(f"{case.name}-alone", case.trainer, case.options, case.stage)


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """The cases of this world by name."""
    cases = [alone(case) if dist.get_world_size() == 1 else case for case in SCRIPTS]
    return {case.name: partial(train, case, folder) for case in cases}
