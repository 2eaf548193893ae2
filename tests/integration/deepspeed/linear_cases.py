"""Training runs of the library's linear language model, told by nothing but a method and a size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from deepspeed_cases import MICRO, Case
from torch import Tensor, nn

from dsp_plugin.comm import Ledger
from dsp_plugin.models.linear_lm import LinearLM, LinearLMConfig, LinearMixer

VOCABULARY = 31
# Three chunks of the unsharded run, and one or two of a rank's; no count of ranks that is tested divides it.
LONG = 149
MODELS: dict[str, dict[str, Any]] = {
    "head": {"decay": "head"},
    "gated-delta": {"decay": "gated-delta", "conv": 4},
    "vector": {"decay": "vector", "conv": 3},
    "hybrid": {"decay": "gated-delta", "conv": 4, "softmax_every": 2},
    "softmax": {"decay": "head", "softmax_every": 1},
}


@dataclass(frozen=True)
class LinearCase(Case):
    """One training run of a model in `MODELS`.

    Attributes:
        length: tokens.
        softmax_method: for hybrid models.
    """

    model: Any
    exchange: str = "auto"
    softmax_method: str | None = None
    length: int = 13

    @property
    def name(self) -> str:
        """Names the case in results and test ids."""
        extras = [
            self.exchange if self.exchange != "auto" else "",
            self.softmax_method or "",
            f"{self.length}tokens" if self.length == LONG else "",
        ]
        return "-".join([super().name, *filter(None, extras)])

    def section(self) -> dict[str, Any]:
        """The user's ``"sequence_parallel"`` section."""
        section = {"method": self.method, "size": self.size}
        if self.exchange != "auto":
            section["exchange"] = self.exchange
        if self.softmax_method is not None:
            section["softmax_method"] = self.softmax_method
        if self.recompute is not None:
            section["recompute"] = self.recompute
        return section

    def unsharded(self) -> LinearCase:
        """The case whose run in one process must be equal."""
        return replace(super().unsharded(), exchange="auto", softmax_method=None)

    def build(self) -> nn.Module:
        """The model, with weights that depend on torch's seed."""
        sizes = {"vocab": VOCABULARY, "width": 48, "heads": 4, "key_dim": 24, "layers": 2, "tie_embeddings": False}
        settings = {
            "checkpoint": self.recompute is not None,
            "seed": torch.initial_seed(),
            "tile_tokens": 5 if self.size > 1 and self.zero % 2 else None,
        }
        model = LinearLM(LinearLMConfig(**sizes, **MODELS[self.model], **settings))
        for module in model.modules():
            if isinstance(module, LinearMixer):
                _make_keys_like_queries(module)
        return model

    def batch(self, step: int, micro: int, replica: int) -> dict[str, Tensor]:
        """The batch of one replica in one micro step: `MICRO` samples, the same in all for every way to group ranks."""
        generator = torch.Generator().manual_seed(1 + micro * self.replicas + replica + 10_000 * step)
        tokens = torch.randint(VOCABULARY, (MICRO, self.length + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        # A masked prompt and padding: the first rank's tokens count least, so a mean of local means is far off.
        labels[0, : self.length // 2] = -100
        labels[1, : self.length // 3] = -100
        labels[1, -2:] = -100
        return {"input_ids": tokens[:, :-1].contiguous(), "labels": labels}

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """The loss as the user's script takes it."""
        return model(**batch)

    def sent(self, log: Ledger) -> int:
        """The least that a method of the case sent."""
        methods = {self.method, self.softmax_method or self.method}
        return min(log.bytes(method=method) for method in methods)


@torch.no_grad()
def _make_keys_like_queries(mixer: LinearMixer) -> None:
    """So that no output is near zero, where the norm behind attention divides rounding by it: fp32 itself is then no
    farther from fp64 than 3e-6, and gradients can be compared.
    """
    for name, parameter in mixer.named_parameters():
        if name.startswith(("qkv", "conv")):
            q, k, _ = parameter.split(mixer.widths)
            k.copy_(q)


def linear_cases(world: int) -> list[LinearCase]:
    """Every model under every ZeRO stage and, in the three worlds together, under every exchange."""
    Lasp = partial(LinearCase, method="lasp", world=world)
    cases = {
        2: [
            Lasp("head", size=2, zero=0, exchange="ring"),
            Lasp("head", size=2, zero=2, exchange="allgather"),
            Lasp("gated-delta", size=2, zero=1, exchange="scan", length=LONG),
            Lasp("gated-delta", size=2, zero=3, exchange="ring"),
            Lasp("vector", size=2, zero=0, exchange="allgather"),
            Lasp("hybrid", size=2, zero=2, softmax_method="lightseq"),
            Lasp("hybrid", size=2, zero=3, softmax_method="ulysses", accumulation=2, clipping=0.05),
            Lasp("hybrid", size=2, zero=1, softmax_method="lightseq", recompute="keep_attention"),
            Lasp("hybrid", size=2, zero=3, softmax_method="ulysses", recompute="keep_attention"),
            Lasp("hybrid", size=2, zero=0, softmax_method="lightseq", recompute="full"),
            Lasp("gated-delta", size=2, zero=1, reload=True),
            LinearCase("softmax", method="ulysses", world=2, size=2, zero=1),
        ],
        3: [
            Lasp("head", size=3, zero=1, exchange="scan"),
            Lasp("head", size=3, zero=3, exchange="ring", length=LONG),
            Lasp("gated-delta", size=3, zero=0, exchange="allgather"),
            Lasp("gated-delta", size=3, zero=2, exchange="scan"),
            Lasp("vector", size=3, zero=1, exchange="ring"),
            Lasp("hybrid", size=3, zero=3, softmax_method="lightseq"),
            Lasp("hybrid", size=3, zero=0, softmax_method="ulysses"),
            Lasp("hybrid", size=3, zero=2, softmax_method="ring"),
        ],
        4: [
            Lasp("head", size=4, zero=0, exchange="allgather"),
            Lasp("head", size=4, zero=2, exchange="ring"),
            Lasp("gated-delta", size=4, zero=3, exchange="scan", length=LONG),
            Lasp("gated-delta", size=4, zero=2, exchange="allgather"),
            Lasp("vector", size=4, zero=3, exchange="scan"),
            Lasp("hybrid", size=4, zero=0, softmax_method="lightseq"),
            Lasp("hybrid", size=2, zero=1, softmax_method="ulysses", accumulation=2),
            Lasp("hybrid", size=4, zero=1, softmax_method="lightseq", recompute="keep_attention"),
            Lasp("gated-delta", size=2, zero=1, then=("lasp", 4)),
            Lasp("hybrid", size=4, zero=2, softmax_method="ulysses"),
            Lasp("hybrid", size=2, zero=3, softmax_method="usp", then=("lasp", 4)),
        ],
    }
    return cases[world]
