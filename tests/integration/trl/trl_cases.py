"""TRL's trainers as its own example scripts call them; what a user adds is the section of the JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from script_world import deepspeed_config
from trl_models import chats, completions, judged, preferences, prompts, saved_preferences, texts

MODEL, PREFERENCES = "model", "preferences"
"""The folders beside the scripts' own: of the model and its tokenizer, and of `saved_preferences`."""


@dataclass(frozen=True)
class Script:
    """One script.

    Attributes:
        build: the trainer, of the model's folder and the arguments of its config.
        stage: of ZeRO.
        options: arguments beside the usual ones.
    """

    build: Callable[[str, dict[str, Any]], Any]
    stage: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, folder: Path, section: dict[str, Any] | None) -> dict[str, Any]:
        """Trains, evaluates and saves.

        Args:
            folder: gets what is saved.
            section: of the JSON.

        Returns:
            What the trainer logged.
        """
        arguments = {
            "deepspeed": deepspeed_config(self.stage, section),
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 1,
            "learning_rate": 0.3,
            "optim": "sgd",
            "logging_steps": 1,
            "eval_strategy": "epoch",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": False,
            **self.options,
        }
        trainer = self.build(str(folder.parent / MODEL), arguments)
        trainer.train()
        trainer.save_model(str(folder))
        return {"log": trainer.state.log_history, "steps": trainer.state.global_step}


def sft(data: Callable[..., Any], **options: Any) -> Callable[[str, dict[str, Any]], Any]:
    """As ``trl/scripts/sft.py``."""

    def build(model: str, arguments: dict[str, Any]) -> Any:
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(
            model=model, args=SFTConfig(**arguments), train_dataset=data(12), eval_dataset=data(5), **options
        )

    return build


def dpo(**options: Any) -> Callable[[str, dict[str, Any]], Any]:
    """As ``trl/scripts/dpo.py``; with no reference model it loads the same model once more."""

    def build(model: str, arguments: dict[str, Any]) -> Any:
        from trl import DPOConfig, DPOTrainer

        train, test = saved_preferences(Path(model).parent / PREFERENCES)
        return DPOTrainer(model=model, args=DPOConfig(**arguments), train_dataset=train, eval_dataset=test, **options)

    return build


def kto(model: str, arguments: dict[str, Any]) -> Any:
    """As ``trl/scripts/kto.py``."""
    from trl import KTOConfig, KTOTrainer

    return KTOTrainer(model=model, args=KTOConfig(**arguments), train_dataset=judged(8), eval_dataset=judged(4))


def reward(model: str, arguments: dict[str, Any]) -> Any:
    """As ``trl/scripts/reward.py``."""
    from trl import RewardConfig, RewardTrainer

    return RewardTrainer(model=model, args=RewardConfig(**arguments), train_dataset=preferences(8))


def grpo(model: str, arguments: dict[str, Any]) -> Any:
    """As ``trl/scripts/grpo.py``."""
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(**arguments, num_generations=2, max_completion_length=8, beta=0.1)
    return GRPOTrainer(model=model, args=config, reward_funcs=unlike_words, train_dataset=prompts(8))


def rloo(model: str, arguments: dict[str, Any]) -> Any:
    """As ``trl/scripts/rloo.py``."""
    from trl import RLOOConfig, RLOOTrainer

    config = RLOOConfig(**arguments, num_generations=2, max_completion_length=8)
    return RLOOTrainer(model=model, args=config, reward_funcs=unlike_words, train_dataset=prompts(8))


def unlike_words(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward: how many of a completion's words differ."""
    return [float(len(set(text.split()))) for text in completions]


def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A loss of a user's own, of whole logits."""
    logits, following = outputs.logits[:, :-1].float(), labels[:, 1:]
    total = -logits.log_softmax(-1).gather(-1, following.clamp(min=0)[..., None])[..., 0][following != -100].sum()
    return total / (following != -100).sum() if num_items_in_batch is None else total / num_items_in_batch


SCRIPTS = {
    "sft": Script(sft(texts), 3, {"max_length": 24}),
    "sft_completion": Script(sft(completions), 2),
    "sft_assistant": Script(sft(chats), 1, {"assistant_only_loss": True}),
    "sft_wrapped": Script(sft(texts), 2, {"packing": True, "packing_strategy": "wrapped", "max_length": 24}),
    "sft_bfd": Script(sft(texts), 2, {"packing": True, "max_length": 40}),
    "sft_padding_free": Script(sft(completions), 1, {"padding_free": True, "max_length": None}),
    "sft_dft": Script(sft(texts), 1, {"loss_type": "dft"}),
    "sft_smoothed": Script(sft(texts), 1, {"label_smoothing_factor": 0.1}),
    "sft_own_loss": Script(sft(texts, compute_loss_func=summed), 2),
    "dpo": Script(dpo(), 1),
    "dpo_mixed": Script(dpo(), 3, {"loss_type": ["sigmoid", "ipo", "sft"], "ld_alpha": 0.5}),
    "dpo_weighted": Script(dpo(), 1, {"use_weighting": True}),
    "dpo_precomputed": Script(dpo(), 1, {"precompute_ref_log_probs": True}),
    "dpo_synced": Script(dpo(), 1, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    "kto": Script(kto, 2),
    "reward": Script(reward, 1, {"eval_strategy": "no"}),
    "grpo": Script(grpo, 1, {"eval_strategy": "no"}),
    "rloo": Script(rloo, 1, {"eval_strategy": "no"}),
}
"""By name; each is run with and without a section."""
COVERING = ("sft", "sft_bfd", "dpo", "kto")
HEAD = "head"
"""The name of what `trl_head` compares."""
REFUSED = {
    "sft_short": Script(sft(texts), 1, {"packing": True, "packing_strategy": "wrapped", "max_length": 20}),
}
"""By name; each ends on every rank, and before its first step, but for rows that are too short."""
