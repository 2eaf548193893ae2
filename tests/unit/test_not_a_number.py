"""A token that is no number leaves those before it and other documents as they are, in all linear attention."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from dsp_plugin import linear_attention, short_convolution
from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.kernels.linear_chunks import pairs

BATCH, LENGTH, HEADS, WIDTH = 2, 75, 2, 4
DOCUMENTS = (range(0, 2), range(2, 70), range(70, 71), range(71, 75))
BORDERS = (0, 2, 70, 71, 75)


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


def with_gradients(inputs: dict[str, Tensor], causal: bool) -> dict[str, Tensor]:
    """The output and all gradients of a sum over documents, by token; for states, too, where there are any."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    found = {}
    if causal:
        leaves["initial_state"] = torch.full((BATCH, HEADS, WIDTH, WIDTH), 0.5).double().requires_grad_()
        out, found["final"] = linear_attention(**leaves, cu_seqlens=BORDERS, output_final_state=True)
        (out.square().sum() + found["final"].square().sum()).backward()
    else:
        out = linear_attention(**leaves, cu_seqlens=BORDERS, causal=False)
        out.square().sum().backward()
    return {"out": out, **found, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def of_others(found: dict[str, Tensor], document: range) -> dict[str, Tensor]:
    """What is no part of the document: a decay per head is one of all of them, states are the ends' first and last."""
    at = {"final": DOCUMENTS[-1], "dinitial_state": DOCUMENTS[0]}
    return {
        name: x if name in at else torch.cat([x[:, : document.start], x[:, document.stop :]], 1)
        for name, x in found.items()
        if at.get(name) != document and (name in at or x.dim() > 1)
    }


@pytest.mark.parametrize(("decay", "causal"), [("none", False), *product(DECAYS, [True])])
def test_other_documents_never_see_it_nor_do_their_gradients(decay: str, causal: bool) -> None:
    inputs = drawn(decay)
    clean = with_gradients(inputs, causal)
    names = [name for name, x in inputs.items() if x.dim() > 1]
    for document, name, value in product(DOCUMENTS, names, (math.nan, math.inf)):
        found = with_gradients(spoilt(inputs, name, (document.start + document.stop) // 2, value), causal)
        assert not found["out"][:, document].isfinite().all(), (document, name, value)
        wanted = of_others(clean, document)
        for part, x in of_others(found, document).items():
            assert torch.equal(x, wanted[part]), (document, name, value, part)


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


@pytest.mark.parametrize("width", [None, 1, WIDTH])
def test_pairs_are_zero_where_a_query_comes_before_its_key(width: int | None) -> None:
    """Whatever the key is, and the gradient there: on CUDA nobody looks for what is no number."""
    q, k = (torch.randn(8, WIDTH, dtype=torch.float64) for _ in range(2))
    sums = None if width is None else -torch.rand(8, width, dtype=torch.float64).cumsum(0)
    ones = torch.ones(8, 8, dtype=torch.float64)
    gradients = []
    for above in (0.0, math.nan):
        leaf = q.clone().requires_grad_()
        pairs(leaf, k, sums, inclusive=True).backward(ones.tril() + torch.full_like(ones, above).triu(1))
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
    k[5] = math.nan
    weights = pairs(q, k, sums, inclusive=True)
    assert not weights.triu(1).any()
    assert weights[:5].isfinite().all()


def test_the_taps_of_a_convolution_reach_back_only() -> None:
    x, weight = torch.randn(2, 20, 3, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    changed = x.clone()
    changed[0, 7, 1] = math.nan
    out, wanted = short_convolution(changed, weight), short_convolution(x, weight)
    assert torch.equal(out[0, :7], wanted[0, :7])
    assert torch.equal(out[0, 11:], wanted[0, 11:])
    assert out[0, 7:11, 1].isnan().all()
