"""Adapters of PEFT, trained alone and in a world of 2 that shares one sequence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import peft
import torch
import torch.distributed as dist
from deepspeed_worker import mean_over_ranks
from hf_cases import OPTIMIZER, STEPS
from hf_cases import Case as Run
from hf_models import build_model, micro_batch
from torch import nn

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALPHA = 5.0
LM = {"task_type": "CAUSAL_LM"}
SMALL = {**LM, "r": 2, "target_modules": ["q_proj", "down_proj"]}


@dataclass(frozen=True)
class Adapted:
    """An adapter, and how it is trained.

    Attributes:
        adapter: its config.
        added: into the model's layers, as its `add_adapter` does, not by a wrapper.
        tile: tokens of a tile of the head, whose weight may be frozen, or a copy that is trained; 0 for none.
    """

    adapter: Callable[[], peft.PeftConfig]
    method: str = "ring"
    zero: int = 1
    checkpointing: str = ""
    added: bool = False
    call: tuple[tuple[str, Any], ...] = ()
    tile: int = 0

    def build(self) -> nn.Module:
        """The model with the adapter, in training mode."""
        model = build_model("llama", self.checkpointing)
        if self.checkpointing:
            model.enable_input_require_grads()
        if self.added:
            return peft.inject_adapter_in_model(self.adapter(), model).train()
        return peft.get_peft_model(model, self.adapter()).train()

    def config(self) -> dict[str, Any]:
        """DeepSpeed's."""
        return Run("llama", self.method, 2, self.zero, tile=self.tile).config()

    def batch(self, step: int) -> dict[str, Any]:
        """One batch, whole."""
        return {**micro_batch("tokens", step, 0, 0), **dict(self.call)}


lora = partial(peft.LoraConfig, r=4, init_lora_weights=False, **LM)
ADAPTED = {
    "lora": Adapted(partial(lora, target_modules=LINEAR), "usp", 2, tile=4),
    "lora-embeddings-head": Adapted(partial(lora, target_modules=["embed_tokens", "lm_head", "q_proj"])),
    "lora-whole-modules": Adapted(
        partial(lora, target_modules=["v_proj"], modules_to_save=["embed_tokens", "lm_head"]),
        "lightseq",
        3,
        tile=3,
    ),
    "lora-checkpointed": Adapted(partial(lora, target_modules=LINEAR), "ulysses", 2, "plain"),
    "lora-reentrant": Adapted(partial(lora, target_modules=LINEAR), "ring", 3, "reentrant"),
    "lora-added": Adapted(partial(lora, target_modules=LINEAR), "lightseq", 0, added=True),
    "dora": Adapted(partial(lora, target_modules=LINEAR, use_dora=True), "ulysses", 3),
    "ia3": Adapted(
        partial(
            peft.IA3Config, target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **LM
        ),
        "usp",
        3,
    ),
    "prompt": Adapted(partial(peft.PromptTuningConfig, num_virtual_tokens=5, **LM), "lightseq", 1),
    "prompt-zero3": Adapted(partial(peft.PromptTuningConfig, num_virtual_tokens=5, **LM), "ulysses", 3),
    "p-tuning": Adapted(partial(peft.PromptEncoderConfig, num_virtual_tokens=5, encoder_hidden_size=16, **LM), "usp"),
    "multitask": Adapted(
        partial(peft.MultitaskPromptTuningConfig, num_virtual_tokens=5, num_tasks=2, **LM),
        zero=2,
        call=(("task_ids", torch.tensor([0, 1])),),
    ),
    "loha": Adapted(partial(peft.LoHaConfig, **SMALL)),
    "lokr": Adapted(partial(peft.LoKrConfig, **SMALL)),
    "oft": Adapted(partial(peft.OFTConfig, **{**SMALL, "r": 0, "oft_block_size": 4})),
    "vera": Adapted(partial(peft.VeraConfig, r=2, target_modules=["q_proj"], **LM)),
    "hra": Adapted(partial(peft.HRAConfig, **SMALL)),
    "norms": Adapted(partial(peft.LNTuningConfig, target_modules=["input_layernorm"], **LM)),
    "tokens": Adapted(partial(peft.TrainableTokensConfig, token_indices=[1, 5, 7], **LM)),
}
# Of them, those of the covering subset.
COVERING = ("lora", "lora-embeddings-head", "lora-whole-modules", "lora-reentrant", "dora", "ia3", "prompt", "p-tuning")
# Beside the losses, whether what is saved is the unsharded run's.
SAVED = ("lora", "lora-whole-modules", "dora", "ia3", "prompt")


@dataclass(frozen=True)
class Trained:
    """The loss of every step, and what was trained."""

    losses: list[float]
    weights: dict[str, torch.Tensor]


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """By name, those that learn."""
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def save(module: nn.Module, folder: Path, write: bool) -> None:
    """As scripts do: the adapter, then the model that it is merged into."""
    if write:
        module.save_pretrained(folder / "adapter")
    if hasattr(module, "merge_and_unload"):
        merged = module.merge_and_unload()
        if write:
            merged.save_pretrained(folder / "merged")


def train_alone(case: Adapted, folder: Path | None = None) -> Trained:
    """The run in this process, with neither DeepSpeed nor the plugin."""
    torch.manual_seed(0)
    model = case.build()
    optimizer = torch.optim.AdamW([p for _, p in trained_parameters(model)], **OPTIMIZER)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(**case.batch(step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = {name: p.detach().clone() for name, p in trained_parameters(model)}
    if folder is not None:
        save(model, folder, write=True)
    return Trained(losses, weights)


def train(name: str, folder: Path) -> dict[str, Any]:
    """The case under DeepSpeed. Weights go to the folder, and what a script saves."""
    case = ADAPTED[name]
    # Peers seed differently: that they hold one model is then DeepSpeed's and our doing, not the seed's.
    torch.manual_seed(dist.get_rank())
    model = case.build()
    optimizer = torch.optim.AdamW([p for _, p in trained_parameters(model)], **OPTIMIZER)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=case.config())
    losses, lengths = [], set()
    inner = model.get_input_embeddings().register_forward_hook(lambda _, __, out: lengths.add(out.shape[1]))
    for step in range(STEPS):
        loss = engine(**case.batch(step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(mean_over_ranks(loss.item()))
    inner.remove()
    whole = deepspeed.zero.GatheredParameters(list(model.parameters())) if case.zero == 3 else contextlib.nullcontext()
    with whole:
        if dist.get_rank() == 0:
            torch.save({name: p.detach().clone() for name, p in trained_parameters(model)}, folder / f"peft-{name}.pt")
        if name in SAVED:
            save(engine.module, folder / f"peft-{name}", write=dist.get_rank() == 0)
    return {"losses": losses, "lengths": sorted(lengths)}


def dropout() -> dict[str, Any]:
    """What LoRA's dropout lets through on this rank, in two runs and with layers recomputed; losses of two steps."""
    found: dict[str, Any] = {}
    for name, checkpointing in (("first", ""), ("again", ""), ("recomputed", "plain")):
        torch.manual_seed(0)
        case = Adapted(partial(lora, target_modules=["q_proj"], lora_dropout=0.5), zero=0, checkpointing=checkpointing)
        model = case.build()
        optimizer = torch.optim.SGD([p for _, p in trained_parameters(model)], lr=0.1)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=case.config())
        kept: list[torch.Tensor] = []
        layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_dropout["default"]
        hook = layer.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out != 0))
        losses = []
        for step in range(2):
            loss = engine(**case.batch(step)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        hook.remove()
        found[name] = {"losses": losses, "kept": kept[0][:, :6].tolist()}
    return found


def noise() -> dict[str, Any]:
    """NEFTune's largest noise, by embeddings that Transformers finds in PEFT's wrapper."""
    from transformers.integrations.neftune import activate_neftune

    model = ADAPTED["lora-embeddings-head"].build()
    optimizer = torch.optim.SGD([p for _, p in trained_parameters(model)], lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ADAPTED["lora-embeddings-head"].config())
    embeddings, largest = model.base_model.model.get_input_embeddings(), 0.0
    plain: list[torch.Tensor] = []
    before = embeddings.register_forward_hook(lambda _, __, out: plain.append(out.detach().clone()))
    activate_neftune(model.base_model.model, ALPHA)
    noisy: list[torch.Tensor] = []
    after = embeddings.register_forward_hook(lambda _, __, out: noisy.append(out.detach()))
    for step in range(10):
        engine(**ADAPTED["lora"].batch(step))
    before.remove()
    after.remove()
    largest = max((a - b).abs().max().item() for a, b in zip(noisy, plain, strict=True))
    return {"largest": largest, "width": noisy[0].shape[-1]}


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """All of them by name."""
    return {
        **{f"peft-{name}": partial(train, name, folder) for name in COVERING},
        "peft-dropout": dropout,
        "peft-noise": noise,
    }
