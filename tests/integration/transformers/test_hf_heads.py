"""Classifiers, encoders and bare backbones under DeepSpeed train as they do alone, told a method and a size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_heads import COVERING, HEADED, train_alone
from hf_models import LENGTH

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in COVERING else pytest.mark.matrix) for name in HEADED]
)
def test_heads_learn_from_whole_hidden_states(name: str, hf_world: Callable[..., Any]) -> None:
    """Losses of every step, every gradient of the first; and layers saw a part of the sequence."""
    losses, gradients = train_alone(HEADED[name])
    for result in hf_world(2, "living").results(f"head-{name}"):
        assert result["losses"] == pytest.approx(losses, rel=LOSS_TOLERANCE)
        assert result["lengths"] in ([LENGTH // 2], [LENGTH - LENGTH // 2])
    found = torch.load(hf_world(2, "living").folder / f"head-{name}.pt")
    assert found.keys() == gradients.keys()
    # Biases before a softmax have none but by rounding: it does not see them.
    scale = max(g.abs().max() for g in gradients.values() if g is not None)
    for parameter, gradient in gradients.items():
        if gradient is None:
            assert found[parameter] is None or not found[parameter].any()
            continue
        error = (found[parameter] - gradient).abs().max() / max(gradient.abs().max(), 1e-2 * scale)
        assert error < GRADIENT_TOLERANCE, f"{parameter}: {error:.1e}"
