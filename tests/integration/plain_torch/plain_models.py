"""Models and batches of plain PyTorch scripts, and how each is sharded: by batch, by plan, Transformers' as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsp_plugin import Plan, Stage

WIDTH, HEADS, WORDS, LENGTH, MICRO = 16, 4, 19, 13, 2


class Attention(nn.Module):
    def __init__(self, dim: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dim, self.causal = dim, causal

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.dim, -2)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-3, -2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(-3, -2).flatten(-2)).movedim(-2, self.dim)


class Layer(nn.Module):
    def __init__(self, dim: int, causal: bool) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Attention(dim, causal), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + torch.tanh(self.mlp(x))


class Words(nn.Module):
    """A causal language model that takes its mean loss itself."""

    def __init__(self, checkpointed: bool = False, unused: bool = False) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.layers = nn.ModuleList(Layer(1, causal=True) for _ in range(2))
        self.unused = nn.Linear(WIDTH, WIDTH) if unused else None
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))
        self.checkpointed = checkpointed

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.words(input_ids) + torch.cos(0.3 * position_ids)[..., None].to(self.scale) * self.scale
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Grid(nn.Module):
    """Attends along one dim of a grid, then along the other."""

    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(Layer(dim, causal=False) for dim in (1, 2, 1))
        self.checkpointed = checkpointed

    def forward(self, seen: Tensor, wanted: Tensor) -> Tensor:
        x = self.enter(seen)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return F.mse_loss(self.leave(x), wanted)


def llama(checkpointed: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attn_implementation="eager",
        )
    )
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _words(generator: torch.Generator) -> dict[str, Tensor]:
    tokens = torch.randint(WORDS, (MICRO, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    # A prompt: the first rank's tokens count least, so a mean of the ranks' means is far off.
    labels[0, :7] = -100
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": labels}


def _pixels(generator: torch.Generator) -> dict[str, Tensor]:
    seen, wanted = torch.randn(2, MICRO, 5, 6, 3, generator=generator, dtype=torch.float64)
    return {"seen": seen, "wanted": wanted}


def _unshifted(generator: torch.Generator) -> dict[str, Tensor]:
    tokens = torch.randint(WORDS, (MICRO, LENGTH), generator=generator)
    labels = tokens.clone()
    labels[0, :7] = -100
    return {"input_ids": tokens, "labels": labels}


@dataclass(frozen=True)
class Kind:
    """A model, its batches, and what is said of it beside method and size.

    Attributes:
        layers: those that are given to ``fully_shard`` one by one.
        tolerance: relative; Transformers takes losses in fp32.
    """

    build: Callable[..., nn.Module]
    batch: Callable[[torch.Generator], dict[str, Tensor]]
    layers: Callable[[Any], Any] = lambda model: model.layers
    settings: dict[str, Any] = field(default_factory=dict)
    plan: Plan | None = None
    tolerance: float = 1e-10

    def micro_batch(self, step: int, micro: int, replica: int) -> dict[str, Tensor]:
        """What one replica is given in one micro step."""
        return self.batch(torch.Generator().manual_seed(1 + replica + 100 * micro + 10_000 * step))


KINDS = {
    "batch": Kind(
        Words,
        _words,
        settings={"attention": ["layers.*.attn"], "batch": {"input_ids": 1, "labels": 1}, "loss": {}},
    ),
    "plan": Kind(
        Grid,
        _pixels,
        plan=Plan(
            "b t s c",
            (Stage("layers.0", ("t",)), Stage("layers.1", ("s",)), Stage("layers.2", ("t",))),
        ),
    ),
    "llama": Kind(llama, _unshifted, layers=lambda model: model.model.layers, tolerance=2e-6),
    "tiled": Kind(
        llama,
        _unshifted,
        settings={"memory": {"mlp_tiles": 3}},
        layers=lambda model: model.model.layers,
        tolerance=2e-6,
    ),
}


def loss_of(returned: Any) -> Tensor:
    """The loss in what a model returned."""
    return returned if isinstance(returned, Tensor) else returned.loss
