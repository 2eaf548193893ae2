"""The training runs that are compared: their data and models, and the same runs in one process without DeepSpeed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from causal_lm import CausalLM
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsp_plugin.comm import Ledger
from dsp_plugin.models.rectified_flow import RectifiedFlow
from dsp_plugin.models.video_dit import VideoDiT

MICRO = 2
# Adam divides by |gradient| + epsilon: a small epsilon turns rounding of small gradients into different steps.
LEARNING_RATE, EPSILON, WEIGHT_DECAY = 2e-3, 1e-4, 0.01
# Five frames of 5 x 7 patches: no count of ranks that is tested divides 5 or 35.
FRAMES, HEIGHT, WIDTH, PATCH = 5, 10, 14, 2
EVEN_LENGTH, ODD_LENGTH = 12, 13


@dataclass(frozen=True)
class Case:
    """One training run under DeepSpeed.

    Attributes:
        model: "video" (the script takes the loss), "lm" (labels masked unevenly, odd length), "even_lm" (all count).
        size: ranks that share a sequence.
        world: ranks of the run; world / size replicas.
        reload: the run goes on after its first step from a checkpoint.
        recompute: what checkpointed layers do with attention; None for layers that are not checkpointed.
        then: method and size after the first step, from a checkpoint; None to stay. The replicas that this takes away
            become micro batches.
        universal: that checkpoint is converted to DeepSpeed's universal format.
    """

    model: Literal["video", "lm", "even_lm"]
    method: str
    size: int
    world: int
    zero: int
    dtype: Literal["fp32", "bf16"] = "fp32"
    accumulation: int = 1
    clipping: float = 0.0
    optimizer: Literal["adamw", "sgd"] = "adamw"
    steps: int = 3
    reload: bool = False
    recompute: str | None = None
    then: tuple[str, int] | None = None
    universal: bool = False

    @property
    def name(self) -> str:
        """Names the case in results and test ids."""
        extras = [
            "" if self.dtype == "fp32" else self.dtype,
            f"gas{self.accumulation}" if self.accumulation > 1 else "",
            "clip" if self.clipping else "",
            "" if self.optimizer == "adamw" else self.optimizer,
            "reload" if self.reload else "",
            self.recompute or "",
            f"then_{self.then[0]}_sp{self.then[1]}" if self.then else "",
            "universal" if self.universal else "",
        ]
        shape = f"sp{self.size}dp{self.world // self.size}"
        return "-".join([self.model, self.method, shape, f"zero{self.zero}", *filter(None, extras)])

    @property
    def replicas(self) -> int:
        """How many sequence groups there are."""
        return self.world // self.size

    def section(self) -> dict[str, Any]:
        """The user's ``"sequence_parallel"`` section."""
        section: dict[str, Any] = {"method": self.method, "size": self.size}
        if self.method == "usp" and self.size == 4:
            section |= {"ulysses_size": 2, "ring_size": 2}
        if self.recompute is not None:
            section["recompute"] = self.recompute
        if self.model == "video":
            return section
        return {
            **section,
            "attention": ["layers.*.attn"],
            "batch": {"input_ids": 1, "position_ids": 1, "labels": 1},
            "loss": {"labels": "labels"},
        }

    def unsharded(self) -> Case:
        """The case whose run in one process must be equal: neither ZeRO nor ranks per sequence change it."""
        plain = replace(self, method="none", size=1, world=self.replicas, zero=0)
        return replace(plain, reload=False, recompute=None, then=None, universal=False)

    def regrouped(self) -> Case:
        """The run after the first step: how ranks are grouped then."""
        if self.then is None:
            return self
        method, size = self.then
        return replace(self, method=method, size=size, accumulation=self.accumulation * size // self.size)

    def build(self) -> nn.Module:
        """The model, with weights that depend on torch's seed."""
        return build_model(self.model, self.recompute is not None)

    def batch(self, step: int, micro: int, replica: int) -> dict[str, Tensor]:
        """The batch of one replica in one micro step: `MICRO` samples, the same in all for every way to group ranks."""
        return micro_batch(self.model, step, micro * self.replicas + replica)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """The loss as the user's script takes it."""
        return micro_loss(self.model, model, batch)

    def sent(self, log: Ledger) -> int:
        """Bytes that only a sharded sequence makes a rank send."""
        return sum(row.bytes for row in log.rows() if row.method not in ("loss", "batch", "agreement", "comparison"))

    def config(self) -> dict[str, Any]:
        """The user's DeepSpeed config."""
        config: dict[str, Any] = {
            "train_batch_size": MICRO * self.accumulation * self.replicas,
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": self.accumulation,
            "zero_optimization": {"stage": self.zero, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            # DeepSpeed clips at 1.0 where the config says nothing; 0 is how to say never.
            "gradient_clipping": self.clipping,
            "steps_per_print": 1000,
            "sequence_parallel": self.section(),
        }
        if self.dtype == "bf16":
            config["bf16"] = {"enabled": True}
        return config


def build_model(kind: str, recompute: bool) -> nn.Module:
    """The model, with weights that depend on torch's seed."""
    if kind == "video":
        model = VideoDiT(channels=1, patch=PATCH, width=24, heads=6, depth=2)
        return checkpointed(model) if recompute else model
    return CausalLM(recompute=recompute)


def checkpointed(model: VideoDiT) -> VideoDiT:
    """The model, its space-time layers recomputed in the backward pass."""
    for layer in model.blocks:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return model


def parameters_optimizer(case: Case, parameters: Any) -> torch.optim.Optimizer:
    """The optimizer that both runs use."""
    if case.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, eps=EPSILON, weight_decay=WEIGHT_DECAY)


def micro_batch(kind: str, step: int, place: int) -> dict[str, Tensor]:
    """One of the micro batches of a step: `MICRO` samples."""
    generator = torch.Generator().manual_seed(1 + place + 10_000 * step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if kind == "video":
        shape = (MICRO, FRAMES, 1, HEIGHT, WIDTH)
        return {
            "video": normal(*shape),
            "labels": torch.randint(10, (MICRO,), generator=generator),
            "t": torch.rand(MICRO, generator=generator),
            "noise": normal(*shape),
        }
    length = EVEN_LENGTH if kind == "even_lm" else ODD_LENGTH
    tokens = torch.randint(31, (MICRO, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    if kind != "even_lm":
        # A masked prompt and padding: the first rank's tokens count least, so a mean of local means is far off.
        labels[0, :6] = -100
        labels[1, :4] = -100
        labels[1, -2:] = -100
    return {
        "input_ids": tokens[:, :-1].contiguous(),
        "position_ids": torch.arange(length).expand(MICRO, -1).contiguous(),
        "labels": labels,
    }


def micro_loss(kind: str, model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The loss as the user's script takes it."""
    if kind == "video":
        return RectifiedFlow().loss(model, batch["video"], batch["labels"], batch["t"], batch["noise"])
    return model(**batch)


@dataclass(frozen=True)
class Trained:
    """What a run leaves: loss per step, gradient norm per step before clipping, gradients of the first step."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]


def train_alone(case: Case) -> Trained:
    """The case in this process, in plain torch: no ranks, no DeepSpeed. bf16 has fp32 master weights beside."""
    torch.manual_seed(0)
    master = case.build()
    work = case.build().to(torch.bfloat16) if case.dtype == "bf16" else master
    optimizer = parameters_optimizer(case, master.parameters())
    losses, norms, gradients = [], [], {}
    for step in range(case.steps):
        if work is not master:
            work.load_state_dict(master.state_dict())
        work.zero_grad()
        total = 0.0
        for micro in range(case.accumulation):
            for replica in range(case.replicas):
                loss = case.loss(work, case.batch(step, micro, replica))
                loss = loss / (case.accumulation * case.replicas)
                loss.backward()
                total += loss.item()
        for source, target in zip(work.parameters(), master.parameters(), strict=True):
            target.grad = source.grad.float() if source.grad is not None else None
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in master.named_parameters()}
        limit = case.clipping or float("inf")
        norms.append(torch.nn.utils.clip_grad_norm_(master.parameters(), limit).item())
        optimizer.step()
        losses.append(total)
    return Trained(losses, norms, gradients)


def parity_cases(world: int) -> list[Case]:
    """fp32 runs of one world that the matrix does not have: sizes that divide nothing, clipping, other optimizers."""
    if world == 2:
        return [
            Case("even_lm", "ulysses", 2, 2, 1),
            Case("even_lm", "ulysses", 2, 2, 3),
            Case("video", "dsp", 2, 2, 2, accumulation=2, clipping=0.05),
            Case("video", "dsp", 2, 2, 3, accumulation=2, clipping=0.05),
            Case("video", "ulysses", 2, 2, 1),
            Case("lm", "ulysses", 2, 2, 1, accumulation=2, clipping=0.05),
            Case("lm", "ulysses", 2, 2, 3, accumulation=2, clipping=0.05),
            Case("lm", "ulysses", 2, 2, 0, optimizer="sgd"),
            Case("lm", "ulysses", 2, 2, 2, optimizer="sgd"),
            Case("lm", "ulysses", 2, 2, 1, reload=True),
            Case("lm", "ulysses", 2, 2, 3, reload=True),
        ]
    if world == 3:
        return [
            *(Case("lm", method, 3, 3, zero) for method, zero in (("ulysses", 1), ("ring", 2), ("lightseq", 3))),
            *(Case("video", method, 3, 3, zero) for method, zero in (("dsp", 0), ("dsp", 3), ("ulysses", 2))),
        ]
    return [
        Case("lm", "ulysses", 4, 4, 2),
        Case("video", "dsp", 4, 4, 1),
        Case("video", "dsp", 2, 4, 2, accumulation=2),
        Case("video", "ulysses", 4, 4, 3),
    ]
