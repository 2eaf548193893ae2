"""A token that is no number leaves those before it as they are, in every kind of linear attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsp_plugin import linear_attention, short_convolution
from dsp_plugin.kernels.linear import DECAYS

BATCH, LENGTH, HEADS, WIDTH = 2, 75, 2, 4


def drawn(decay: str) -> dict[str, Tensor]:
    """Inputs of more than one chunk."""
    draw = torch.Generator().manual_seed(3)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(BATCH, LENGTH, HEADS, *shape, generator=draw, dtype=torch.float64)

    inputs = {"q": tensor(WIDTH), "k": torch.nn.functional.normalize(tensor(WIDTH), dim=-1), "v": tensor(WIDTH)}
    if decay == "head":
        inputs["g"] = -torch.rand(HEADS, generator=draw, dtype=torch.float64)
    elif decay in ("scalar", "gated-delta"):
        inputs["g"] = -tensor().abs()
    elif decay in ("vector", "kda"):
        inputs["g"] = -tensor(WIDTH).abs()
    if decay in ("delta", "gated-delta", "kda"):
        inputs["beta"] = tensor().sigmoid()
    return inputs


def spoilt(inputs: dict[str, Tensor], name: str, at: int, value: float) -> dict[str, Tensor]:
    changed = inputs[name].clone()
    changed[1, at, 0, ...] = value
    return {**inputs, name: changed}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("decay", DECAYS)
def test_earlier_tokens_never_see_it(decay: str, value: float) -> None:
    inputs = drawn(decay)
    wanted = linear_attention(**inputs)
    for name, at in ((name, at) for name in inputs for at in (5, 70) if inputs[name].dim() > 1):
        out = linear_attention(**spoilt(inputs, name, at, value))
        assert torch.equal(out[:, :at], wanted[:, :at]), (name, at)
        if (name, value) != ("g", -math.inf):  # Which forgets everything, and is a legal decay.
            assert not out[1, at, 0].isfinite().all(), (name, at)
        # Nor does another head or row.
        assert torch.equal(out[0], wanted[0]), (name, at)
        assert torch.equal(out[1, :, 1], wanted[1, :, 1]), (name, at)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_value_that_is_no_number_keeps_to_its_column_and_out_of_earlier_gradients(decay: str) -> None:
    inputs, at = drawn(decay), 9
    changed = inputs["v"].clone()
    changed[1, at, 0, 2] = math.nan
    gradients = []
    for v in (inputs["v"], changed):
        leaves = {name: x.clone().requires_grad_() for name, x in {**inputs, "v": v}.items()}
        out = linear_attention(**leaves)
        out[:, :at].square().sum().backward()
        gradients.append([leaves[name].grad[:, :at] for name in "qkv"])
    for got, wanted in zip(*gradients, strict=True):
        assert torch.equal(got, wanted)
    clean = torch.cat([out[..., :2], out[..., 3:]], -1)
    assert clean.isfinite().all()
    assert out[1, at:, 0, 2].isnan().all()


def test_the_taps_of_a_convolution_reach_back_only() -> None:
    x, weight = torch.randn(2, 20, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    changed = x.clone()
    changed[0, 7, 1] = math.nan
    out, wanted = short_convolution(changed, weight), short_convolution(x, weight)
    assert torch.equal(out[0, :7], wanted[0, :7])
    assert torch.equal(out[0, 11:], wanted[0, 11:])
    assert out[0, 7:11, 1].isnan().all()
