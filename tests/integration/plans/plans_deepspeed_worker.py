"""One rank that trains other people's models under DeepSpeed: ``plans_deepspeed_worker.py FOLDER``.

Rank 0 writes ``NAME.pt`` to the folder for every run: its losses, its first gradients, and the bytes that it sent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 3
# Adam divides by |gradient| + epsilon: a small epsilon turns rounding of small gradients into different steps.
LEARNING_RATE, EPSILON = 2e-3, 1e-4


class Run(NamedTuple):
    """One training run: which model, the method of the flag, and DeepSpeed's ZeRO stage."""

    model: str
    method: str
    zero: int
    recompute: bool = False

    @property
    def name(self) -> str:
        """Names the run in results and test ids."""
        return f"{self.model}-{self.method}-zero{self.zero}" + ("-recompute" if self.recompute else "")


RUNS = [
    Run("latte", "dsp", 2),
    Run("latte", "dsp", 3, recompute=True),
    Run("wan", "ulysses", 2),
    Run("wan", "ulysses", 3),
    Run("timesformer", "dsp", 2),
    Run("timesformer", "dsp", 3),
]


class Denoiser(nn.Module):
    """A diffusers model as users wrap it: the loss is that of the noise."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, noise: Tensor, **inputs: Any) -> Tensor:
        """The mean squared error."""
        return F.mse_loss(self.model(**inputs).sample, noise)


class Classifier(nn.Module):
    """A transformers model as users wrap it: the loss is its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        """The mean loss over videos."""
        return self.model(**inputs).loss


def classifier() -> tuple[nn.Module, Callable[[int], dict[str, Any]]]:
    """TimeSformer, as `built`: 25 patches and 5 frames, neither even."""
    from dsp_plugin.patches.transformers import timesformer

    torch.manual_seed(5)
    model, inputs = timesformer.subject(frames=5, image=20, patch=4, hidden=24, heads=4, depth=2, batch=2, labels=7)
    with torch.no_grad():
        # It starts with positions of zero.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))

    def batch(step: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        return {
            "pixel_values": torch.randn(inputs["pixel_values"].shape, generator=generator),
            "labels": torch.randint(7, (2,), generator=generator),
        }

    return Classifier(model), batch


def built(run: Run) -> tuple[nn.Module, Callable[[int], dict[str, Any]]]:
    """The model, the same on every rank, and what it is called with in each step."""
    if run.model == "timesformer":
        return classifier()
    from dsp_plugin.patches.diffusers import latte, wan

    torch.manual_seed(5)
    small = {"channels": 3, "heads": 4, "batch": 2, "caption": 3, "caption_channels": 6}
    if run.model == "latte":
        model, inputs = latte.subject(frames=5, side=6, head_dim=4, **small)
    else:
        model, inputs = wan.subject(frames=5, height=6, width=6, head_dim=12, **small)
    if run.recompute:
        model.enable_gradient_checkpointing()

    def batch(step: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(step)
        shapes = {name: value.shape for name, value in inputs.items() if value.is_floating_point()}
        drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        times = torch.randint(1000, (2,), generator=generator)
        return {**drawn, "timestep": times, "noise": torch.randn(shapes["hidden_states"], generator=generator)}

    return Denoiser(model), batch


def train_alone(run: Run) -> dict[str, Any]:
    """The run in this process, in plain torch."""
    module, batch = built(run)
    optimizer = _optimizer(module)
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = module(**batch(step))
        loss.backward()
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "gradients": gradients}


def _optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, eps=EPSILON)


def train(run: Run) -> dict[str, Any]:
    """The run by the calls of a user's script."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    import dsp_plugin

    module, batch = built(run)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": run.zero, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        # DeepSpeed clips at 1.0 where the config says nothing; 0 is how to say never.
        "gradient_clipping": 0.0,
        "steps_per_print": 1000,
        "sequence_parallel": {"method": run.method, "size": 2},
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=_optimizer(module), config=config)
    losses, gradients, sent = [], {}, 0
    for step in range(STEPS):
        with dsp_plugin.ledger() as log:
            loss = engine(**batch(step))
            engine.backward(loss)
        sent = sum(row.bytes for row in log.rows() if row.method not in ("loss", "batch", "agreement", "comparison"))
        if step == 0:
            found = {name: safe_get_full_grad(parameter) for name, parameter in module.named_parameters()}
            gradients = {name: gradient.clone() for name, gradient in found.items()}
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return {"losses": losses, "gradients": gradients, "sent": sent}


def main() -> None:
    """Trains all runs, one after the other."""
    import deepspeed
    import torch.distributed as dist

    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    for run in RUNS:
        print(f"run {run.name}", flush=True)
        result = train(run)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{run.name}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    # The line that a user adds, unless the launcher of dsp_plugin starts the script.
    import dsp_plugin  # noqa: F401

    main()
