"""`dsp_plugin.token_log_probs` beside log-probabilities of whole logits, and what a shard makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsp_plugin import SequenceParallelConfigError, token_log_probs

ROWS, TOKENS, WIDTH, CLASSES = 2, 11, 6, 17


def made() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, labels of which some are ignored."""
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64).mul_(1.7).requires_grad_()
        for shape in ((ROWS, TOKENS, WIDTH), (CLASSES, WIDTH), (CLASSES,))
    )
    labels = torch.randint(CLASSES, (ROWS, TOKENS))
    labels[0, :3] = -100
    return hidden, weight, bias, labels


def dense(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """The same of whole logits."""
    logits = (hidden @ weight.T + bias) * how.get("scale", 1.0)
    cap = how.get("softcap")
    logits = (logits if cap is None else cap * torch.tanh(logits / cap)) / how.get("temperature", 1.0)
    logs = logits.log_softmax(-1)
    found = logs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return found.masked_fill(labels == -100, 0.0), -(logs.exp() * logs).sum(-1)


@pytest.mark.parametrize("tile", [1, 4, 100, None])
@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.7}, {"scale": 0.3, "softcap": 1.5}, {"scale": 0.3, "softcap": 1.5, "temperature": 0.6}],
)
def test_numbers_and_gradients_are_those_of_whole_logits(how: dict[str, float], tile: int | None) -> None:
    hidden, weight, bias, labels = made()
    weights = torch.randn(2, ROWS, TOKENS, dtype=torch.float64)
    found = token_log_probs(hidden, weight, labels, tile_tokens=tile, bias=bias, with_entropy=True, **how)
    expected = dense(hidden, weight, bias, labels, **how)
    gradients = []
    for one, two in (found, expected):
        gradients.append(torch.autograd.grad((weights[0] * one + weights[1] * two).sum(), (hidden, weight, bias)))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_without_entropy_there_is_one_tensor() -> None:
    hidden, weight, bias, labels = made()
    found = token_log_probs(hidden, weight, labels, tile_tokens=3, bias=bias)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, dense(hidden, weight, bias, labels)[0])


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"softcap": -1.0}, {"tile_tokens": 0}])
def test_what_is_not_above_zero_is_refused(wrong: dict[str, Any]) -> None:
    hidden, weight, _, labels = made()
    with pytest.raises(SequenceParallelConfigError, match=next(iter(wrong))):
        token_log_probs(hidden, weight, labels, **wrong)
