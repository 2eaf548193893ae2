"""Runs over stages or tensor-parallel ranks beside sequence groups, on four ranks: two of each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.module import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.utils import groups, safe_get_full_grad
from deepspeed_cases import Trained
from pipeline_layers import VOCABULARY, Embedding, Head, Whole, layers, loss, tied_head
from torch import Tensor

import dsp_plugin
from dsp_plugin.kernels import calls

sys.path.insert(1, str(Path(__file__).parents[1] / "transformers"))

from hf_models import build_model, micro_batch

WORLD, SIZE, MICRO, STEPS, LENGTH, SEED = 4, 2, 2, 3, 13, 1234
OPTIMIZER = {"lr": 2e-3, "eps": 1e-4, "weight_decay": 0.01}
SOFTMAX = ("ulysses", "ring", "usp", "lightseq")


@dataclass(frozen=True)
class GridCase:
    """A run of `WORLD` ranks, two to a sequence.

    Attributes:
        kind: "pipeline" (two stages) or "autotp" (two tensor-parallel ranks).
        recompute: what checkpointed layers do with attention; None for layers that are not checkpointed.
        tied: the head of the pipeline has the weights of the embedding.
        loader: the engine makes its own loader, of a dataset.
        tiles: in which MLPs are computed.
    """

    kind: str
    method: str
    zero: int
    accumulation: int = 1
    recompute: str | None = None
    tied: bool = False
    loader: bool = False
    tiles: int = 1

    @property
    def name(self) -> str:
        """Names the case in results and test ids."""
        extras = [f"gas{self.accumulation}", self.recompute or "", "tied" * self.tied, "loader" * self.loader]
        extras += [f"tiles{self.tiles}"] * (self.tiles > 1)
        return "-".join([self.kind, self.method, f"zero{self.zero}", *filter(None, extras)])

    def section(self) -> dict[str, Any]:
        """The user's ``"sequence_parallel"`` section."""
        section: dict[str, Any] = {"method": self.method, "size": SIZE}
        if self.recompute:
            section["recompute"] = self.recompute
        if self.tiles > 1:
            section["memory"] = {"mlp_tiles": self.tiles}
        if self.kind == "pipeline":
            section |= {
                "attention": ["*.layer.mixer" if self.method == "lasp" else "*.attn"],
                "batch": {"inputs.0": 1, "labels": 1},
                "positions": "inputs.1",
                "loss": {"labels": "labels"},
            }
        return section

    def config(self) -> dict[str, Any]:
        """The user's DeepSpeed config."""
        config: dict[str, Any] = {
            "train_batch_size": MICRO * self.accumulation,
            "train_micro_batch_size_per_gpu": MICRO,
            "zero_optimization": {"stage": self.zero, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "steps_per_print": 1000,
            "sequence_parallel": self.section(),
        }
        if self.kind == "autotp":
            config["tensor_parallel"] = {"autotp_size": 2}
        if self.recompute:
            config["pipeline"] = {"activation_checkpoint_interval": 1, "use_reentrant": self.recompute == "full"}
        return config


def cases() -> list[tuple[GridCase, bool]]:
    """Every run, and whether CI has it."""
    pipelines = [
        GridCase("pipeline", method, zero, accumulation=3 - zero, loader=method == "ring")
        for method in (*SOFTMAX, "lasp")
        for zero in (0, 1)
    ]
    pipelines += [
        GridCase("pipeline", "ulysses", 1, accumulation=3, recompute="full"),
        GridCase("pipeline", "ring", 1, accumulation=3, recompute="keep_attention"),
        GridCase("pipeline", "ulysses", 0, accumulation=2, tied=True),
        GridCase("pipeline", "ulysses", 1, accumulation=2, tied=True),
    ]
    tensors = [GridCase("autotp", method, zero, accumulation=2) for method in SOFTMAX for zero in range(4)]
    covering = {(method, index % 4) for index, method in enumerate(SOFTMAX)}
    tiled = [GridCase("autotp", "ring", zero, accumulation=2, tiles=3) for zero in range(4)]
    return [
        *((case, case.zero == 1 or case.tied) for case in pipelines),
        *((case, (case.method, case.zero) in covering) for case in tensors),
        *((case, False) for case in tiled),
    ]


def pipeline_batch(step: int, micro: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """One micro batch: ``((tokens, positions), labels)``, labels masked unevenly."""
    generator = torch.Generator().manual_seed(1 + micro + 100 * step)
    tokens = torch.randint(VOCABULARY, (MICRO, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[0, :7] = -100
    labels[1, :4] = -100
    return (tokens[:, :-1].contiguous(), torch.arange(LENGTH).expand(MICRO, -1).contiguous()), labels


def fed(case: GridCase, step: int, micro: int) -> tuple[Any, Tensor]:
    """What the script feeds: positions are filled in where the case leaves them out."""
    inputs, labels = pipeline_batch(step, micro)
    return ((inputs[0],), labels) if not case.loader else (inputs, labels)


def train_pipeline(case: GridCase, folder: Path) -> dict[str, Any]:
    """The case under DeepSpeed, by the calls of a user's script."""
    torch.manual_seed(dist.get_rank())
    specs = [LayerSpec(kind) for kind in layers(case.method == "lasp")]
    if case.tied:
        tie = {"tied_weight_attr": "weight"}
        specs = [TiedLayerSpec("embedding", Embedding, **tie), *specs[1:]]
        specs.append(TiedLayerSpec("embedding", Embedding, forward_fn=tied_head, **tie))
    else:
        specs.append(LayerSpec(Head))
    model = PipelineModule(
        specs,
        num_stages=2,
        loss_fn=loss,
        seed_layers=True,
        base_seed=SEED,
        partition_method="uniform",
        # Reentrant checkpointing, DeepSpeed's default, cannot start from tokens, which need no gradient.
        checkpointable_layers=["SoftmaxBlock"],
    )
    data = [
        (tuple(x[sample] for x in inputs), labels[sample])
        for step in range(STEPS)
        for inputs, labels in (pipeline_batch(step, micro) for micro in range(case.accumulation))
        for sample in range(MICRO)
    ]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), **OPTIMIZER),
        config=case.config(),
        training_data=data if case.loader else None,
    )
    gradients: dict[str, Tensor] = {}
    keep_gradients_of_first_step(engine, gradients)
    losses, sent = [], 0
    for step in range(STEPS):
        feed = None if case.loader else iter([fed(case, step, micro) for micro in range(case.accumulation)])
        with dsp_plugin.ledger() as log, calls() as made:
            losses.append(engine.train_batch(feed).item())
        sent += sum(row.bytes for row in log.rows() if row.method not in ("loss", "batch", "agreement", "comparison"))
    evaluated = engine.eval_batch(iter([fed(case, 0, micro) for micro in range(case.accumulation)])).item()
    result = {
        "losses": losses,
        "evaluated": evaluated,
        "samples": engine.global_samples,
        "sent": sent,
        "forwards": made.forward,
        "grid": [engine.grid.data_parallel_size, engine.dp_world_size],
    }
    torch.save(gradients, folder / f"{case.name}.stage{engine.stage_id}.rank{dist.get_rank()}.pt")
    engine.destroy()
    return result


def keep_gradients_of_first_step(engine: Any, gradients: dict[str, Tensor]) -> None:
    """Copies them when they are reduced and no optimizer has used them."""
    upstream = engine._take_model_step

    def take(*args: Any, **kwargs: Any) -> None:
        if not gradients:
            for name, parameter in engine.module.named_parameters():
                gradients[name] = safe_get_full_grad(parameter).detach().float().clone()
        upstream(*args, **kwargs)

    engine._take_model_step = take


def train_tensor_parallel(case: GridCase, folder: Path) -> dict[str, Any]:
    """The same for AutoTP."""
    torch.manual_seed(0)
    model = build_model("llama")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), **OPTIMIZER), config=case.config()
    )
    losses, sent, gradients = [], 0, {}
    for step in range(STEPS):
        total = 0.0
        for micro in range(case.accumulation):
            with dsp_plugin.ledger() as log:
                taken = engine(**micro_batch("tokens", step, micro, 0)).loss
                engine.backward(taken)
            total += taken.item() / case.accumulation
            sent += log.bytes(method=case.method)
            if step == 0 and micro == case.accumulation - 1:
                found = {name: safe_get_full_grad(p).detach().float() for name, p in model.named_parameters()}
                gradients = {name: whole(gradient, shapes[name]) for name, gradient in found.items()}
            engine.step()
        losses.append(total)
    if dist.get_rank() == 0:
        torch.save(gradients, folder / f"{case.name}.pt")
    result = {"losses": losses, "samples": engine.global_samples, "sent": sent}
    engine.destroy()
    return result


def whole(gradient: Tensor, shape: torch.Size) -> Tensor:
    """A gradient from the parts of the tensor-parallel ranks, along the dim that they cut."""
    if gradient.shape == shape:
        return gradient.clone()
    dim = next(dim for dim in range(len(shape)) if gradient.shape[dim] != shape[dim])
    # 31 logits are 16 and 15.
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, gradient, group=groups.get_tensor_model_parallel_group())
    return torch.cat(parts, dim)


def pipeline_alone(case: GridCase) -> Trained:
    """The run in this process, in plain torch."""
    model = Whole(case.method == "lasp", case.tied, SEED)
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)

    def step_loss(step: int, micro: int) -> Tensor:
        inputs, labels = pipeline_batch(step, micro)
        return loss(model(inputs), labels) / case.accumulation

    return _alone(case, optimizer, step_loss, lambda: dict(model.gradients()))


def tensor_parallel_alone(case: GridCase) -> Trained:
    """The same for a model of Transformers."""
    torch.manual_seed(0)
    model = build_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    return _alone(
        case,
        optimizer,
        lambda step, micro: model(**micro_batch("tokens", step, micro, 0)).loss / case.accumulation,
        lambda: {name: parameter.grad.clone() for name, parameter in model.named_parameters()},
    )


def _alone(
    case: GridCase,
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[int, int], Tensor],
    gradients_now: Callable[[], dict[str, Tensor]],
) -> Trained:
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(case.accumulation):
            part = loss_of(step, micro)
            part.backward()
            total += part.item()
        gradients = gradients or gradients_now()
        optimizer.step()
        losses.append(total)
    return Trained(losses, [], gradients)


def runs(folder: Path, everything: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """The runs of a session by name."""
    trained = {"pipeline": train_pipeline, "autotp": train_tensor_parallel}

    def run(case: GridCase) -> dict[str, Any]:
        # DeepSpeed keeps the grid of the last engine for all.
        groups.mpu = None
        return trained[case.kind](case, folder)

    return {case.name: partial(run, case) for case, covering in cases() if everything or covering}
