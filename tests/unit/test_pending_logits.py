"""What a model's code may do to logits that nobody has computed, and what a script may."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from dsp_plugin import UnsupportedError
from dsp_plugin.patches.transformers.pending import PendingLogits
from dsp_plugin.tiles.head import tiled_loss
from dsp_plugin.tiles.spec import HeadSpec

ROWS, TOKENS, WIDTH, CLASSES = 2, 7, 4, 11


class Head:
    """Of a family called Seen."""

    family, classes = "Seen", CLASSES

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.weight = torch.randn(CLASSES, WIDTH, dtype=torch.float64, requires_grad=True)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight.T

    def loss(self, hidden: Tensor, labels: Tensor, what: HeadSpec) -> Tensor:
        return tiled_loss(hidden, self.weight, labels, tile_tokens=3, what=what)


def made() -> tuple[PendingLogits, Head, Tensor]:
    """With hidden states that have a gradient."""
    head = Head()
    hidden = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    return PendingLogits(hidden, head), head, hidden


def capped(logits: Any) -> Any:
    logits = logits / 3.0
    logits = torch.tanh(logits)
    return logits * 3.0


KNOWN: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda logits: logits,
    "scale": lambda logits: logits * 0.25,
    "scale from the left": lambda logits: 2 * logits,
    "by torch": lambda logits: torch.div(torch.mul(logits, 3.0), 2),
    "in place of itself": lambda logits: _inplace(logits),
    "cap": capped,
    "cap by a method": lambda logits: logits.div(2.0).tanh().mul(2.0),
    "scale and cap": lambda logits: capped(logits * 0.3),
    "another factor behind the cap": lambda logits: torch.tanh(logits * 0.5) * 5.0 / 2,
    "wider": lambda logits: logits.to(torch.float64).contiguous(),
}


def _inplace(logits: Any) -> Any:
    logits *= 0.5
    return logits


@pytest.mark.parametrize("way", KNOWN)
def test_what_families_do_is_part_of_the_loss(way: str) -> None:
    pending, head, hidden = made()
    labels = torch.randint(CLASSES, (ROWS, TOKENS))
    labels[0, 2:4] = -100
    losses = [
        KNOWN[way](pending).loss(labels, CLASSES, -100),
        torch.nn.functional.cross_entropy(
            KNOWN[way](head.logits(hidden)).flatten(0, 1), labels.flatten(), reduction="sum"
        ),
    ]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, (hidden, head.weight)) for loss in losses), rtol=1e-10, atol=1e-12
    )
    with torch.no_grad():
        torch.testing.assert_close(KNOWN[way](pending).compute(), KNOWN[way](head.logits(hidden)), rtol=0, atol=0)


UNKNOWN: dict[str, Callable[[Any], Any]] = {
    "a part": lambda logits: logits[..., :3],
    "a sum": lambda logits: logits + 1.0,
    "a sum from the left": lambda logits: torch.ones(CLASSES) + logits,
    "a tensor that scales": lambda logits: logits * torch.ones(()),
    "a tensor that scales from the left": lambda logits: torch.ones(()) * logits,
    "a function": lambda logits: torch.nn.functional.log_softmax(logits, dim=-1),
    "a method": lambda logits: logits.softmax(-1),
    "in place": lambda logits: logits.mul_(2.0),
    "in a list": lambda logits: torch.cat([logits, logits]),
    "two caps": lambda logits: capped(capped(logits)),
    "narrower": lambda logits: logits.to(torch.bfloat16),
    "nothing left": lambda logits: logits * 0.0,
    "rounded": lambda logits: torch.div(logits, 2.0, rounding_mode="floor"),
    "a question": bool,
    "numbers": lambda logits: logits.tolist(),
    "other classes": lambda logits: logits.loss(torch.zeros(ROWS, TOKENS, dtype=torch.int64), CLASSES - 1, -100),
}


@pytest.mark.parametrize("way", UNKNOWN)
def test_anything_else_is_refused_with_the_family_named(way: str) -> None:
    pending, *_ = made()
    with pytest.raises(UnsupportedError, match=r"memory\.tile_tokens=.*forward of Seen.*\"tile_tokens\": null"):
        UNKNOWN[way](pending)


def test_shape_and_dtype_are_those_of_logits() -> None:
    pending, *_ = made()
    assert pending.shape == (ROWS, TOKENS, CLASSES) == pending.size()
    assert pending.size(-1) == CLASSES
    assert (pending.dim(), pending.ndim, pending.dtype) == (3, 3, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = PendingLogits(torch.ones(1, 2, WIDTH), Head())
    assert narrow.dtype == torch.bfloat16
    assert narrow.float().dtype == torch.float32
    assert copy.copy(pending).shape == pending.shape


@pytest.mark.parametrize("grad", [True, False])
def test_once_returned_they_are_computed_without_gradients_alone(grad: bool) -> None:
    pending, head, hidden = made()
    with torch.set_grad_enabled(grad):
        found = capped(pending)
        found.returned()
    assert found.readable is not grad
    # As accelerate does to what a model returns.
    found = found.to(torch.float64)
    if not grad:
        computed = found.compute()
        assert not computed.requires_grad
        torch.testing.assert_close(computed, capped(head.logits(hidden)).detach(), rtol=0, atol=0)
        return
    for way in (lambda: found.compute(), lambda: found.sum(), lambda: found + 1):
        with pytest.raises(UnsupportedError, match=r"logits beside a loss=.*torch\.no_grad\(\)"):
            way()
