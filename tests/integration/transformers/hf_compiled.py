"""Models of Transformers with something compiled, trained alone and in a world of 2 that shares one sequence."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from deepspeed_worker import mean_over_ranks
from hf_cases import OPTIMIZER
from hf_cases import Case as Run
from hf_models import build_model, micro_batch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

# Tokens of a row in every step: the first two make the compiler take lengths for what changes.
LENGTHS = (13, 9, 11, 12, 7)
SETTLED = 2


@dataclass(frozen=True)
class Compiled:
    """A run.

    Attributes:
        how: what is compiled, and whether before `deepspeed.initialize` or after.
        compiles: whether there are graphs at all: torch compiles nothing in a layer that it checkpoints.
    """

    family: str
    method: str
    zero: int
    how: str
    batch: str = "tokens"
    checkpointing: str = ""
    memory: str = ""
    backend: str = "aot_eager"
    compiles: bool = True

    def config(self) -> dict[str, Any]:
        """DeepSpeed's."""
        return Run(self.family, self.method, 2, self.zero, memory=self.memory).config()


CASES = {
    "model-before": Compiled("llama", "ulysses", 1, "model before"),
    "layers-after": Compiled("qwen3", "lightseq", 3, "layers after", "padded"),
    "inductor": Compiled("llama", "ring", 2, "layers before", backend="inductor"),
}
MATRIX = {
    "engine": Compiled("mistral", "ring", 3, "engine", "packed"),
    "checkpointed": Compiled("llama", "ulysses", 1, "engine", checkpointing="plain", memory="all but rounds"),
    "tiles": Compiled("qwen3", "ulysses", 3, "engine", "items", memory="tiles"),
    "model-after": Compiled("qwen2", "usp", 2, "model after"),
    "layers-put-before": Compiled("llama", "usp", 0, "layers put before", "packed"),
    "layers-put-after": Compiled("llama", "ring", 0, "layers put after"),
    "step": Compiled("mistral", "ulysses", 2, "step"),
    "reentrant": Compiled("llama", "ring", 1, "layers after", checkpointing="reentrant", compiles=False),
    "everything": Compiled("qwen2", "ulysses", 3, "engine", checkpointing="plain", memory="everything"),
    "engine-inductor": Compiled("qwen2", "ulysses", 2, "engine", backend="inductor"),
    "step-inductor": Compiled("llama", "lightseq", 1, "step", backend="inductor"),
}


@dataclass(frozen=True)
class Trained:
    """The loss of every step, and the gradients of the first."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]


def batches(case: Compiled) -> list[dict[str, Any]]:
    """Whole, one a step."""
    found = []
    for step, length in enumerate(LENGTHS):
        whole = micro_batch(case.batch, step, 0, 0)
        found.append({key: x[:, :length] if isinstance(x, torch.Tensor) else x for key, x in whole.items()})
        if case.batch == "padded":
            # The cut has left no padding, or some.
            found[-1]["labels"] = torch.where(found[-1]["attention_mask"] == 1, found[-1]["labels"], -100)
    return found


def train_alone(case: Compiled) -> Trained:
    """In this process, with neither DeepSpeed, the plugin nor a compiler."""
    torch.manual_seed(0)
    model = build_model(case.family)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    losses, gradients = [], {}
    for batch in batches(case):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    return Trained(losses, gradients)


@contextmanager
def counted(backend: str) -> Iterator[CompileCounterWithBackend]:
    """A backend that counts its graphs; what others have compiled is forgotten."""
    # A folder that outlives the run, and one for each rank: else one would wait for the other's lock.
    folder = Path(tempfile.gettempdir()) / f"dsp_plugin_inductor_{os.getuid()}" / str(dist.get_rank())
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    torch.compiler.reset()
    yield CompileCounterWithBackend(backend)
    torch.compiler.reset()


def compile_layers(how: str, model: nn.Module, backend: Any) -> None:
    layers = model.model.layers
    for index, layer in enumerate(layers):
        if how.startswith("layers put"):
            layers[index] = torch.compile(layer, backend=backend)
        elif how.startswith("layers"):
            layer.compile(backend=backend)


def train(name: str, folder: Path) -> dict[str, Any]:
    """The case under DeepSpeed; its gradients go to the folder."""
    case = {**CASES, **MATRIX}[name]
    torch.manual_seed(dist.get_rank())
    model = build_model(case.family, case.checkpointing)
    with counted(case.backend) as backend:
        given: Any = model
        if case.how.endswith("before"):
            compile_layers(case.how, model, backend)
            given = torch.compile(model, backend=backend) if case.how == "model before" else model
        engine, *_ = deepspeed.initialize(
            model=given, optimizer=torch.optim.AdamW(model.parameters(), **OPTIMIZER), config=case.config()
        )
        if case.how.endswith("after"):
            compile_layers(case.how, model, backend)
        if case.how == "engine":
            engine.compile(backend=backend)
        if case.how == "model after":
            model.compile(backend=backend)

        def loss_of(**batch: Any) -> torch.Tensor:
            return engine(**batch).loss

        if case.how == "step":
            loss_of = torch.compile(loss_of, backend=backend)
        losses, graphs, first = [], [], {}
        for batch in batches(case):
            loss = loss_of(**batch)
            engine.backward(loss)
            losses.append(mean_over_ranks(loss.item()))
            if not first:
                found = {key: safe_get_full_grad(p) for key, p in model.named_parameters()}
                first = {key.replace("_orig_mod.", ""): g.detach().float().clone() for key, g in found.items()}
            engine.step()
            graphs.append(backend.frame_count)
    engine.destroy()
    if dist.get_rank() == 0:
        torch.save(first, folder / f"compiled-{name}.pt")
    return {"losses": losses, "graphs": graphs}


def refused(how: str) -> dict[str, Any]:
    """What the compiler says where it may not end a graph, and that parts in which nothing is exchanged are none."""
    torch.manual_seed(0)
    model = build_model("llama")
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), **OPTIMIZER),
        config=Run("llama", "ulysses", 2, 1).config(),
    )
    batch = micro_batch("tokens", 0, 0, 0)
    with counted("aot_eager") as backend:
        whole = engine(**batch).loss.item()
        if how == "parts":
            for layer in model.model.layers:
                layer.mlp.compile(backend=backend, fullgraph=True)
            return {"error": abs(engine(**batch).loss.item() - whole), "graphs": backend.frame_count}
        if how == "model":
            model.compile(backend=backend, fullgraph=True)
        if how == "layer":
            model.model.layers[0].compile(backend=backend, fullgraph=True)
        try:
            engine(**batch)
        except Exception as error:
            return {"said": f"{type(error).__name__}: {error}"}
    return {"said": ""}


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Those of the covering subset by name."""
    return {
        **{f"compiled-{name}": partial(train, name, folder) for name in CASES},
        **{f"fullgraph-{how}": partial(refused, how) for how in ("parts", "layer", "model")},
    }
