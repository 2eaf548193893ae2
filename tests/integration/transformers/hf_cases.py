"""The training runs that are compared, and the same runs in one process with neither DeepSpeed nor the plugin."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hf_models import HYBRIDS, MICRO, build_model, micro_batch, micro_loss

from dsp_plugin.verification.double import InDouble, backward

# Adam divides by |gradient| + epsilon: a small epsilon turns rounding of small gradients into different steps.
OPTIMIZER = {"lr": 2e-3, "eps": 1e-4, "weight_decay": 0.01}
STEPS = 3
CONFIGS = Path(__file__).parents[3] / "configs" / "deepspeed"
METHODS, FAMILIES, CHECKPOINTING = (
    ("ring", "usp", "lightseq", "ulysses"),
    ("llama", "qwen2", "qwen3", "mistral"),
    ("", "plain", "reentrant", "plain"),
)


# Every part of it, for methods that gather tokens, and for others.
MEMORIES: dict[str, Any] = {
    "everything": {"tile_tokens": 5, "mlp_tiles": 3, "offload": True, "attention_rounds": 2},
    "all but rounds": {"tile_tokens": 5, "mlp_tiles": 3, "offload": "1GiB"},
    "tiles": {"tile_tokens": 5, "mlp_tiles": 3},
    "auto": "auto",
}


@dataclass(frozen=True)
class Case:
    """One training run under DeepSpeed; `world` / `size` replicas.

    Attributes:
        batch: the kind of batch, see `hf_models.micro_batch`.
        extra: further settings of the section.
        file: of `configs/deepspeed`, which gives everything but sizes, dtype and optimizer.
        tile: tokens of a tile of the head; 0 for none.
        memory: a name in `MEMORIES`: what else a step trades for memory.
    """

    family: str
    method: str
    size: int
    zero: int
    batch: str = "tokens"
    checkpointing: str = ""
    world: int = 0
    dtype: str = "fp32"
    extra: tuple[tuple[str, Any], ...] = field(default=())
    file: str = ""
    tile: int = 0
    memory: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "world", self.world or self.size)

    @property
    def name(self) -> str:
        """Names the case in results and test ids."""
        dtype, file = "" if self.dtype == "fp32" else self.dtype, "file" if self.file else ""
        tile = f"tile{self.tile}" if self.tile else ""
        extras = [self.checkpointing, dtype, file, tile, self.memory, *(f"{k}-{v}" for k, v in self.extra)]
        batch = "" if self.batch == "tokens" else self.batch
        shape = f"sp{self.size}dp{self.replicas}"
        return "-".join([self.family, self.method, shape, f"zero{self.zero}", *filter(None, [batch, *extras])])

    @property
    def reference(self) -> str:
        """The dtype of the run that it is compared with: Transformers' own states round more than ours in fp32."""
        return "fp64" if self.family in HYBRIDS else "fp32"

    @property
    def replicas(self) -> int:
        """How many sequence groups there are."""
        return self.world // self.size

    def config(self) -> dict[str, Any]:
        """The user's DeepSpeed config."""
        config: dict[str, Any] = {
            "zero_optimization": {"stage": self.zero, "stage3_param_persistence_threshold": 0},
            "sequence_parallel": {"method": self.method, **dict(self.extra)},
        }
        if self.file:
            config = json.loads((CONFIGS / self.file).read_text())
            del config["optimizer"]
        config["sequence_parallel"]["size"] = self.size
        if self.tile:
            config["sequence_parallel"]["memory"] = {"tile_tokens": self.tile}
        if self.memory:
            config["sequence_parallel"]["memory"] = MEMORIES[self.memory]
        return config | {
            "train_micro_batch_size_per_gpu": MICRO,
            "gradient_accumulation_steps": 1,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "steps_per_print": 1000,
            "bf16": {"enabled": self.dtype == "bf16"},
        }


def cases(world: int) -> list[Case]:
    """The runs of one world."""
    if world == 4:
        return [
            Case("llama", "usp", 4, 1, checkpointing="plain", extra=(("ulysses_size", 2),)),
            Case("qwen3", "ring", 2, 2, world=4, tile=3),
        ]
    # Methods, stages and families pairwise: an orthogonal array, halved over the sizes.
    runs = [
        Case(FAMILIES[m ^ z], METHODS[m], world, z, checkpointing=CHECKPOINTING[(m + z + world) % 4])
        for m in range(4)
        for z in range(4)
        if (m + z // 2) % 2 == world % 2
    ]
    if world == 2:
        runs += [
            Case("mistral", "ring", 2, 2, "packed"),
            Case("qwen2", "ulysses", 2, 1, "padded"),
            Case("llama", "lightseq", 2, 0, "items"),
            Case("llama", "ring", 2, 1, "embedded"),
            Case("qwen3", "usp", 2, 3, "unlabelled"),
            Case("llama", "ring", 2, 3, extra=(("layout", "striped"),)),
            Case("llama", "ring", 2, 2, dtype="bf16"),
            # Tiles that do not divide the tokens of a rank, and one that has more; tied weights.
            Case("llama", "ulysses", 2, 0, "items", tile=3),
            Case("mistral", "ring", 2, 1, "packed", tile=4),
            Case("qwen3", "usp", 2, 2, "padded", checkpointing="plain", tile=5),
            Case("qwen3", "ring", 2, 3, tile=3),
            Case("llama", "usp", 2, 3, "embedded", checkpointing="reentrant", tile=100),
            Case("llama", "ring", 2, 1, dtype="bf16", tile=3),
            Case("llama", "ulysses", 2, 3, "packed", checkpointing="plain", memory="everything"),
            Case("qwen2", "usp", 2, 1, "padded", checkpointing="reentrant", memory="everything"),
            Case("qwen3", "ring", 2, 2, checkpointing="plain", memory="all but rounds"),
            Case("llama", "ulysses", 2, 1, checkpointing="plain", memory="auto"),
            Case("llama", "ring", 2, 3, file="hf_ring_zero3.json"),
            Case("qwen3", "usp", 2, 2, file="hf_usp_zero2.json"),
            Case("qwen3_next", "ring", 2, 3, checkpointing="plain"),
            Case("bamba", "ulysses", 2, 2, "padded"),
            # Last, for as long as its engine lives all engines of the process keep attention.
            Case("mistral", "lightseq", 2, 1, checkpointing="plain", file="hf_lightseq_zero1.json"),
        ]
    else:
        runs += [Case("llama", method, 3, 1, "short") for method in METHODS]
        runs += [Case("mistral", "usp", 3, 0, "packed"), Case("qwen3", "ring", 3, 3, "short", tile=1)]
        runs += [Case("qwen3_next", "ulysses", 3, 2), Case("bamba", "usp", 3, 3), Case("minimax", "ring", 3, 3)]
        runs += [Case("minimax", "ulysses", 3, 2, checkpointing="reentrant")]
    return runs


@dataclass(frozen=True)
class Trained:
    """What a run leaves: the loss of every step, and the gradients of the first."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]


def train_alone(family: str, batch: str, replicas: int, dtype: str = "fp32") -> Trained:
    """The run in this process, by Transformers' eager attention. bf16 has fp32 master weights beside."""
    torch.manual_seed(0)
    # Drawn in fp32, as the sharded model's are.
    master = build_model(family).to(torch.float64 if dtype == "fp64" else torch.float32)
    if dtype == "fp64" and hasattr(master, "set_experts_implementation"):
        # Grouped kernels have no fp64.
        master.set_experts_implementation("eager")
    work = build_model(family).to(torch.bfloat16) if dtype == "bf16" else master
    optimizer = torch.optim.AdamW(master.parameters(), **OPTIMIZER)
    losses, gradients = [], {}
    for step in range(STEPS):
        if work is not master:
            work.load_state_dict(master.state_dict())
        work.zero_grad()
        total = 0.0
        for replica in range(replicas):
            with InDouble() if dtype == "fp64" else nullcontext():
                loss = micro_loss(batch, work, micro_batch(batch, step, 0, replica)) / replicas
                backward(loss)
            total += loss.item()
        for source, target in zip(work.parameters(), master.parameters(), strict=True):
            target.grad = source.grad.to(target.dtype)
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in master.named_parameters()}
        optimizer.step()
        losses.append(total)
    return Trained(losses, gradients)
