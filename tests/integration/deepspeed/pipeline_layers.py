"""A causal language model as layers of a pipeline: each takes and returns what the next one takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from causal_lm import Layer
from torch import Tensor, nn

from dsp_plugin.models.linear_lm import LinearLM, LinearLMConfig

VOCABULARY, WIDTH = 31, 48


class Embedding(nn.Module):
    """Tokens and positions to activations and positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)

    @property
    def weight(self) -> Tensor:
        """What a tied head uses."""
        return self.tokens.weight

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        input_ids, position_ids = inputs
        return self.tokens(input_ids), position_ids


class SoftmaxBlock(Layer):
    """A layer with softmax attention."""

    def __init__(self) -> None:
        super().__init__(WIDTH, heads=6, kv_heads=2, dropout=0.0)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x_BLC, position_ids = inputs
        return super().forward(x_BLC, position_ids), position_ids


class LinearBlock(nn.Module):
    """A layer with linear attention, from the library's own model."""

    def __init__(self) -> None:
        super().__init__()
        config = LinearLMConfig(vocab=VOCABULARY, width=WIDTH, heads=4, key_dim=24, layers=1, seed=torch.initial_seed())
        self.layer = LinearLM(config).layers[0]

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x_BLC, position_ids = inputs
        return self.layer(x_BLC, None), position_ids


class Head(nn.Module):
    """Activations to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return self.out(self.norm(inputs[0]))


def tied_head(embedding: Embedding, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """The same, with the weights of the embedding."""
    return F.linear(F.layer_norm(inputs[0], (WIDTH,)), embedding.weight)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the labels that count."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def layers(linear: bool) -> list[type[nn.Module]]:
    """What stands between tokens and the head."""
    block = LinearBlock if linear else SoftmaxBlock
    return [Embedding, block, block]


class Whole(nn.Module):
    """The same layers in one process, with the names that a `PipelineModule` gives them."""

    def __init__(self, linear: bool, tied: bool, seed: int) -> None:
        super().__init__()
        self.tied = tied
        for index, kind in enumerate([*layers(linear), *([] if tied else [Head])]):
            torch.manual_seed(seed + index)
            self.add_module(str(index), kind())

    def forward(self, inputs: Any) -> Tensor:
        for layer in self.children():
            inputs = layer(inputs)
        return tied_head(getattr(self, "0"), inputs) if self.tied else inputs

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """By the names of the pipeline."""
        for name, parameter in self.named_parameters():
            assert parameter.grad is not None
            named = f"tied_modules.embedding.{name[2:]}" if self.tied and name.startswith("0.") else name
            yield named, parameter.grad.clone()
