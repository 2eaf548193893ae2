"""Models whose MLPs are computed in tiles, trained alone and in a world of 2 that shares one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import peft
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from deepspeed.utils import safe_get_full_grad
from deepspeed_worker import mean_over_ranks
from hf_cases import OPTIMIZER, STEPS
from hf_cases import Case as Run
from hf_models import build_model, micro_batch
from hf_peft import LINEAR, LM
from torch import nn

MEMORY = {"mlp_tiles": 3}


@dataclass(frozen=True)
class Tiled:
    """A run.

    Attributes:
        learns: "all", "adapters", or a part of the names of what does.
        micro: micro-batches of a step.
    """

    family: str
    method: str
    zero: int
    checkpointing: str = ""
    learns: str = "all"
    micro: int = 1

    def build(self) -> nn.Module:
        """The model in training mode."""
        model = build_model(self.family, self.checkpointing)
        if self.learns == "adapters":
            if self.checkpointing:
                model.enable_input_require_grads()
            config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=LINEAR, **LM)
            return peft.get_peft_model(model, config).train()
        if self.learns != "all":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self.learns in name)
        return model

    def config(self, memory: dict[str, Any] | str) -> dict[str, Any]:
        """DeepSpeed's; ZeRO 3 gathers weights when they are needed, not before, and keeps none."""
        found = Run(self.family, self.method, 2, self.zero, extra=(("memory", memory),)).config()
        at_need = ("prefetch_bucket_size", "max_reuse_distance", "max_live_parameters")
        found["zero_optimization"] |= {f"stage3_{name}": 0 for name in at_need}
        return found | {"gradient_accumulation_steps": self.micro}


TILED = {
    "zero0": Tiled("qwen2", "ulysses", 0, "reentrant"),
    "zero1": Tiled("mistral", "lightseq", 1),
    "zero2-adapters": Tiled("llama", "usp", 2, "plain", "adapters"),
    "zero3": Tiled("llama", "ring", 3),
    "zero3-checkpointed": Tiled("qwen3", "ulysses", 3, "plain"),
    "zero3-reentrant": Tiled("llama", "ring", 3, "reentrant"),
    "zero3-adapters": Tiled("llama", "lightseq", 3, "", "adapters"),
    "zero3-first-mlp": Tiled("llama", "ring", 3, "", "layers.0.mlp"),
    "zero2": Tiled("llama", "ring", 2, "plain"),
    "zero1-micro": Tiled("llama", "ring", 1, "plain", micro=2),
    "zero3-micro": Tiled("llama", "ring", 3, "plain", micro=2),
    "zero3-adapters-checkpointed": Tiled("llama", "ring", 3, "plain", "adapters"),
    "zero3-adapters-reentrant": Tiled("llama", "ring", 3, "reentrant", "adapters"),
    "zero0-first-mlp": Tiled("llama", "ring", 0, "", "layers.0.mlp"),
}
# Of them, those of the covering subset.
COVERING = ("zero0", "zero1", "zero2-adapters", "zero3", "zero3-adapters-checkpointed", "zero3-first-mlp")
# And those of which the all-gathers of the run without tiles are counted, too.
COUNTED = ("zero3", "zero3-checkpointed", "zero3-reentrant")


@dataclass(frozen=True)
class Trained:
    """The loss of every micro-batch, and the gradients of the first step."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the parameters that learn."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train_alone(case: Tiled) -> Trained:
    """The run in this process, with neither DeepSpeed nor the plugin."""
    torch.manual_seed(0)
    model = case.build()
    optimizer = torch.optim.AdamW(learning(model).values(), **OPTIMIZER)
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(case.micro):
            loss = model(**micro_batch("tokens", step, micro, 0)).loss
            (loss / case.micro).backward()
            losses.append(loss.item())
        gradients = gradients or {name: p.grad.clone() for name, p in learning(model).items()}
        optimizer.step()
    return Trained(losses, gradients)


@contextmanager
def gathers() -> Iterator[list[int]]:
    """Elements of each all-gather of ZeRO 3."""
    found: list[int] = []
    upstream = partition_parameters._dist_allgather_fn

    def counting(given: torch.Tensor, out: torch.Tensor, *args: Any) -> Any:
        found.append(out.numel())
        return upstream(given, out, *args)

    partition_parameters._dist_allgather_fn = counting
    try:
        yield found
    finally:
        partition_parameters._dist_allgather_fn = upstream


def train(name: str, folder: Path, memory: dict[str, Any] | str = MEMORY) -> dict[str, Any]:
    """The case under DeepSpeed; its gradients go to the folder."""
    case = TILED[name]
    # Peers seed differently: that they hold one model is then DeepSpeed's and our doing, not the seed's.
    torch.manual_seed(dist.get_rank())
    model = case.build()
    optimizer = torch.optim.AdamW(learning(model).values(), **OPTIMIZER)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=case.config(memory))
    sizes: list[int] = []
    for part in model.modules():
        if type(part).__name__.endswith("MLP"):
            part.act_fn.register_forward_hook(lambda _, __, out: sizes.append(out[..., 0].numel()))
    losses, gathered, first = [], [], {}
    for step in range(STEPS):
        with gathers() as elements:
            for micro in range(case.micro):
                loss = engine(**micro_batch("tokens", step, micro, 0)).loss
                engine.backward(loss)
                losses.append(mean_over_ranks(loss.item()))
                if step == 0 and micro == case.micro - 1:
                    found = {key: safe_get_full_grad(p) for key, p in learning(model).items()}
                    first = {key: None if g is None else g.detach().float().clone() for key, g in found.items()}
                engine.step()
        gathered.append([len(elements), sum(elements)])
    if dist.get_rank() == 0 and memory == MEMORY:
        torch.save(first, folder / f"tiled-{name}.pt")
    return {"losses": losses, "sizes": sizes, "gathered": gathered}


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Those of the covering subset by name."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in COVERING:
        found[f"tiled-{name}"] = partial(train, name, folder)
    return {**found, "whole-zero3": partial(train, "zero3", folder, {})}
