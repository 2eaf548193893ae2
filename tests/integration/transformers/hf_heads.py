"""Models with other heads than a language model's, and encoders, alone and in a world of 2 that shares one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import peft
import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import safe_get_full_grad
from hf_cases import Case as Run
from hf_models import LENGTH, MICRO, SHAPE, VOCABULARY, WINDOW
from torch import Tensor, nn

STEPS, LABELS, PADDING = 2, 3, 0
DECODER = {
    **SHAPE,
    "classifier_dropout": 0.0,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": PADDING,
}
ENCODER = {**SHAPE, "hidden_size": 32, "num_attention_heads": 4, "hidden_dropout_prob": 0.0, "pad_token_id": PADDING}
ENCODER |= {"attention_probs_dropout_prob": 0.0}
MODERN = {**SHAPE, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "pad_token_id": PADDING}
MODERN |= {"local_attention": 2 * (WINDOW - 1), "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1}
MODERN |= {"eos_token_id": 2}


@dataclass(frozen=True)
class Headed:
    """A model, and how it is trained.

    Attributes:
        kind: the model's class.
        settings: of its config.
        labels: "sequence", "tokens", "masked", "span", or "" for a loss of the script's own.
    """

    kind: str
    settings: dict[str, Any]
    labels: str
    method: str = "ring"
    zero: int = 1
    checkpointing: bool = False
    adapted: bool = False
    types: bool = False
    padded: bool = False

    def build(self) -> Any:
        """The model in training mode."""
        kind = getattr(transformers, self.kind)
        model = kind(kind.config_class(num_labels=2 if self.labels == "span" else LABELS, **self.settings))
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.adapted:
            adapter = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"], init_lora_weights=False)
            model = peft.get_peft_model(model, adapter)
        return model.train()

    def batch(self, step: int) -> dict[str, Any]:
        """Whole, of tokens that are none of padding; with padding, each row has its own."""
        generator = torch.Generator().manual_seed(step)
        draw = partial(torch.randint, generator=generator)
        batch: dict[str, Any] = {"input_ids": draw(3, VOCABULARY, (MICRO, LENGTH))}
        if self.types:
            batch["token_type_ids"] = draw(2, (MICRO, LENGTH))
        if self.labels == "sequence":
            batch["labels"] = draw(LABELS, (MICRO,))
        if self.labels in ("tokens", "masked"):
            batch["labels"] = draw(LABELS if self.labels == "tokens" else VOCABULARY, (MICRO, LENGTH))
            batch["labels"][0, :5] = batch["labels"][1, 9:] = -100
        if self.labels == "span":
            batch |= {"start_positions": draw(LENGTH, (MICRO,)), "end_positions": draw(LENGTH, (MICRO,))}
        if self.padded:
            batch["attention_mask"] = torch.ones(MICRO, LENGTH, dtype=torch.int64)
            batch["attention_mask"][0, LENGTH - 5 + step :] = batch["attention_mask"][1, LENGTH - 3 :] = 0
            batch["input_ids"][batch["attention_mask"] == 0] = PADDING
            if self.labels in ("tokens", "masked"):
                batch["labels"][batch["attention_mask"] == 0] = -100
        return batch

    def loss(self, model: Any, step: int) -> Tensor:
        """Of one batch."""
        output = model(**self.batch(step))
        return output.loss if self.labels else output.last_hidden_state[:, ::3].sin().square().mean()


HEADED = {
    "llama-sequence": Headed("LlamaForSequenceClassification", DECODER, "sequence", "usp", 3),
    "llama-tokens": Headed("LlamaForTokenClassification", DECODER, "tokens", "lightseq", 2, checkpointing=True),
    "llama-headless": Headed("LlamaModel", DECODER, "", "ulysses"),
    "qwen2-sequence-lora": Headed("Qwen2ForSequenceClassification", DECODER, "sequence", adapted=True),
    "bert-masked": Headed("BertForMaskedLM", ENCODER, "masked", "ulysses", 3, types=True),
    "bert-sequence": Headed("BertForSequenceClassification", ENCODER, "sequence", "ring", checkpointing=True),
    "roberta-tokens": Headed(
        "RobertaForTokenClassification", {**ENCODER, "type_vocab_size": 2, "pad_token_id": 1}, "tokens", "usp", 2
    ),
    "electra-span": Headed("ElectraForQuestionAnswering", {**ENCODER, "embedding_size": 16}, "span", "lightseq", 0),
    "modernbert-masked": Headed("ModernBertForMaskedLM", MODERN, "masked", "ring", 2),
    "modernbert-sequence": Headed("ModernBertForSequenceClassification", MODERN, "sequence", "ulysses", 1),
    "bert-masked-padded": Headed("BertForMaskedLM", ENCODER, "masked", "ring", 2, padded=True),
    "bert-sequence-padded": Headed("BertForSequenceClassification", ENCODER, "sequence", "usp", 1, padded=True),
    "llama-sequence-padded": Headed("LlamaForSequenceClassification", DECODER, "sequence", "ring", 2, padded=True),
    "modernbert-masked-padded": Headed("ModernBertForMaskedLM", MODERN, "masked", "ulysses", 1, padded=True),
}

# Of them, those of the covering subset.
COVERING = (
    *("llama-sequence", "qwen2-sequence-lora", "bert-masked", "bert-sequence-padded", "roberta-tokens"),
    *("modernbert-masked-padded", "llama-sequence-padded"),
)


def learned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """By name, what learns."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def train_alone(case: Headed) -> tuple[list[float], dict[str, Tensor | None]]:
    """Losses, and the gradients of the first step, with neither DeepSpeed nor the plugin."""
    torch.manual_seed(0)
    model = case.build()
    optimizer = torch.optim.SGD([p for _, p in learned(model)], lr=0.1)
    losses: list[float] = []
    gradients: dict[str, Tensor | None] = {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = case.loss(model, step)
        loss.backward()
        if not step:
            gradients = {name: None if p.grad is None else p.grad.clone() for name, p in learned(model)}
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


def train(case: Headed, path: Path) -> dict[str, Any]:
    """The same under DeepSpeed; gradients go to the path."""
    torch.manual_seed(dist.get_rank())
    model = case.build()
    optimizer = torch.optim.SGD([p for _, p in learned(model)], lr=0.1)
    config = Run("", case.method, 2, case.zero).config()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses, lengths = [], set()
    watched = [m for name, m in model.named_modules() if name.endswith(("mlp", "intermediate.dense"))]
    hook = watched[0].register_forward_hook(lambda _, __, out: lengths.add(out.shape[1]))
    for step in range(STEPS):
        loss = case.loss(engine, step)
        engine.backward(loss)
        if not step:
            found = {name: safe_get_full_grad(p) for name, p in learned(model)}
            if dist.get_rank() == 0:
                torch.save({name: None if g is None else g.detach().clone() for name, g in found.items()}, path)
        engine.step()
        losses.append(loss.item())
    hook.remove()
    return {"losses": losses, "lengths": sorted(lengths)}


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """All of them by name."""
    return chosen(folder, COVERING)


def chosen(folder: Path, names: Iterable[str]) -> dict[str, Callable[[], dict[str, Any]]]:
    """Those of the names."""
    return {f"head-{name}": partial(train, HEADED[name], folder / f"head-{name}.pt") for name in names}
