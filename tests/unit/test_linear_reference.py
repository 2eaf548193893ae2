"""The oracle of linear attention by what is known of it without running it, and by flash-linear-attention's own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.kernels.linear import linear_attention
from dsp_plugin.kernels.linear_reference import token_recurrence
from dsp_plugin.mask import MaskSpec
from dsp_plugin.verification import Case
from dsp_plugin.verification.linear import draw

pytestmark = pytest.mark.timeout(60)

DELTA = ("delta", "gated-delta", "kda")


def drawn(decay: str, **fields: Any) -> dict[str, Tensor]:
    """Inputs, and with states the gradient ``dfinal [B, H, K, V]`` of the one final state."""
    shape = {"batch": 2, "heads": 3, "kv_heads": 3, "length": 20, "head_dim": 8, "value_dim": 5} | fields
    tensors = draw(Case("lasp", 1, decay=decay, mask=MaskSpec(causal=True), **{"dtype": torch.float64, **shape}))
    return tensors | ({"dfinal": tensors["dfinal"][0]} if "dfinal" in tensors else {})


def inputs_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if name not in ("dout", "dfinal")}


def test_without_decay_it_is_causal_attention_without_softmax() -> None:
    x = drawn("none")
    out, state = token_recurrence(**inputs_of(x))
    weights = torch.einsum("bihk,bjhk->bhij", x["q"], x["k"]).tril() * 8**-0.5
    torch.testing.assert_close(out, torch.einsum("bhij,bjhv->bihv", weights, x["v"]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, torch.einsum("bjhk,bjhv->bhkv", x["k"], x["v"]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", ["head", "scalar", "vector"])
def test_every_token_fades_by_the_product_of_the_decays_after_it(decay: str) -> None:
    x = drawn(decay)
    g = {"head": lambda g: g[None, None, :, None], "scalar": lambda g: g[..., None], "vector": lambda g: g}[decay](
        x["g"]
    ).expand(2, 20, 3, 8)
    out, state = token_recurrence(**inputs_of(x))
    for t in (0, 7, 19):
        # From s to t, the decays of s+1 up to and including t.
        expected = torch.zeros(2, 3, 8, 5, dtype=torch.float64)
        for s in range(t + 1):
            fade = g[:, s + 1 : t + 1].sum(1).exp()
            expected += (fade * x["k"][:, s])[..., None] * x["v"][:, s, :, None, :]
        read = torch.einsum("bhk,bhkv->bhv", x["q"][:, t], expected) * 8**-0.5
        torch.testing.assert_close(out[:, t], read, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", DELTA)
def test_the_delta_rule_replaces_what_is_stored_under_a_key(decay: str) -> None:
    """At beta 1 reading a key gives what was just written under it, at beta 0 nothing is written or lost."""
    x = inputs_of(drawn(decay, states=True))
    written = x | {"q": x["k"], "beta": torch.ones_like(x["beta"])}
    out, _ = token_recurrence(**written, scale=1.0)
    torch.testing.assert_close(out, x["v"], rtol=1e-12, atol=1e-12)
    untouched = x | {"beta": torch.zeros_like(x["beta"])} | ({"g": torch.zeros_like(x["g"])} if "g" in x else {})
    _, state = token_recurrence(**untouched)
    assert torch.equal(state, x["initial_state"])
    halfway, _ = token_recurrence(**written | {"beta": torch.full_like(x["beta"], 0.5)}, scale=1.0)
    before = torch.einsum("bhk,bhkv->bhv", x["k"][:, 0] * _decay_of_first(x), x["initial_state"])
    torch.testing.assert_close(halfway[:, 0], (before + x["v"][:, 0]) / 2, rtol=1e-12, atol=1e-12)


def _decay_of_first(x: dict[str, Tensor]) -> Tensor | float:
    g = x.get("g")
    return 1.0 if g is None else (g[:, 0].exp() if g.dim() == 4 else g[:, 0, :, None].exp())


@pytest.mark.parametrize("decay", ["none", "head", "scalar", "vector", *DELTA])
def test_documents_are_sequences_of_their_own_and_the_first_has_the_initial_state(decay: str) -> None:
    x = inputs_of(drawn(decay, states=True, heads=4, kv_heads=2))
    borders = (0, 6, 6, 7, 20)
    out, state = token_recurrence(**x, cu_seqlens=borders)
    start: Tensor | None = x.pop("initial_state")
    parts = []
    for first, last in ((0, 6), (6, 7), (7, 20)):
        own = {name: y if y.dim() == 1 else y[:, first:last] for name, y in x.items()}
        part, final = token_recurrence(**own, initial_state=start)
        parts.append(part)
        start = None
    assert torch.equal(out, torch.cat(parts, 1))
    assert torch.equal(state, final)


def test_bidirectional_attention_sums_over_the_document() -> None:
    x = inputs_of(drawn("none", heads=4, kv_heads=2))
    out, state = token_recurrence(**x, causal=False, cu_seqlens=(0, 6, 20), scale=0.5)
    assert state is None
    for t, document in ((0, slice(0, 6)), (5, slice(0, 6)), (6, slice(6, 20)), (19, slice(6, 20))):
        for head in range(4):
            keys, values = x["k"][:, document, head // 2], x["v"][:, document, head]
            expected = 0.5 * torch.einsum("bk,bjk,bjv->bv", x["q"][:, t, head // 2], keys, values)
            torch.testing.assert_close(out[:, t, head], expected, rtol=1e-12, atol=1e-12)


def test_each_query_and_key_head_serves_consecutive_value_heads() -> None:
    x = inputs_of(drawn("kda", heads=6, kv_heads=2))
    out, _ = token_recurrence(**x)
    wide, _ = token_recurrence(**x | {name: x[name][:, :, [0, 0, 0, 1, 1, 1]] for name in ("q", "k")})
    assert torch.equal(out, wide)


def test_nothing_is_a_sequence_too() -> None:
    x = inputs_of(drawn("kda", length=1, states=True))
    nothing = {name: y if name == "initial_state" else y[:, :0] for name, y in x.items()}
    out, state = token_recurrence(**nothing)
    assert out.shape == (2, 0, 3, 5)
    assert torch.equal(state, x["initial_state"])


@pytest.mark.parametrize("decay", ["head", "scalar", "vector", *DELTA])
def test_gradients_are_those_of_finite_differences(decay: str) -> None:
    tensors = drawn(decay, length=4, batch=1, heads=2, kv_heads=1, head_dim=3, value_dim=2, states=True)
    names, leaves = zip(*((n, y.requires_grad_()) for n, y in inputs_of(tensors).items()), strict=True)
    assert torch.autograd.gradcheck(
        lambda *given: token_recurrence(**dict(zip(names, given, strict=True)), cu_seqlens=(0, 3, 4)), leaves
    )


def test_borders_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SequenceParallelConfigError, match="last border is 19"):
        token_recurrence(**inputs_of(drawn("none")), cu_seqlens=(0, 19))


@cache
def naive(name: str) -> ModuleType:
    """flash-linear-attention's ``fla/ops/<name>/naive.py`` by its path: importing ``fla.ops`` would need triton."""
    found = importlib.util.find_spec("fla")
    assert found is not None, "fla-core is not installed: pip install -e .[test]"
    (folder,) = found.submodule_search_locations or [""]
    spec = importlib.util.spec_from_file_location(f"fla_{name}", Path(folder) / "ops" / name / "naive.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _heads_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """For functions of ``[B, H, T, D]``."""

    def call(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **settings: Any) -> tuple[Tensor, Tensor | None]:
        out, state = function(*(x.transpose(1, 2) for x in (q, k, v, beta)), **settings)
        return out.transpose(1, 2), state

    return call


def _simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, function: str, **settings: Any) -> Any:
    g = torch.zeros(v.shape[:3]) if g is None else g.expand(v.shape[:3])
    return getattr(naive("simple_gla"), function)(q, k, v, g, **settings)


def _gla(g: Tensor, **settings: Any) -> Any:
    return naive("gla").naive_recurrent_gla(gk=g, **settings)


# The decays each can serve, the function, and whether it takes an initial state and returns the final one.
NAIVE: dict[str, tuple[tuple[str, ...], Callable[[], Callable[..., Any]], bool]] = {
    "simple_gla recurrent": (
        ("none", "head", "scalar"),
        lambda: partial(_simple_gla, function="naive_recurrent_simple_gla"),
        True,
    ),
    "simple_gla chunk": (
        ("none", "head", "scalar"),
        lambda: partial(_simple_gla, function="naive_chunk_simple_gla"),
        True,
    ),
    "simple_gla parallel": (
        ("head", "scalar"),
        lambda: partial(_simple_gla, function="naive_parallel_simple_gla"),
        False,
    ),
    "gla recurrent": (("vector",), lambda: _gla, True),
    "delta_rule recurrence": (("delta",), lambda: _heads_first(naive("delta_rule").delta_rule_recurrence), True),
    "delta_rule chunkwise": (("delta",), lambda: _heads_first(naive("delta_rule").delta_rule_chunkwise), False),
    "gated_delta_rule recurrent": (
        ("gated-delta",),
        lambda: naive("gated_delta_rule").naive_recurrent_gated_delta_rule,
        True,
    ),
    "gated_delta_rule chunk": (("gated-delta",), lambda: naive("gated_delta_rule").naive_chunk_gated_delta_rule, True),
    "kda recurrent": (("kda",), lambda: naive("kda").naive_recurrent_kda, True),
    "kda chunk": (("kda",), lambda: naive("kda").naive_chunk_kda, True),
}


def differentiated(attend: Callable[..., Any], tensors: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs_of(tensors).items()}
    out, state = attend(**leaves, **settings)
    outputs, incoming = [out], [tensors["dout"].to(out.dtype)]
    if "dfinal" in tensors:
        outputs, incoming = [*outputs, state], [*incoming, tensors["dfinal"].to(state.dtype)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    results = {"out": out.detach()} | ({"state": state.detach()} if "dfinal" in tensors else {})
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def local(*, output_final_state: bool = False, **inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    """`linear_attention`, whose result is no pair where no state was asked for."""
    result = linear_attention(**inputs, output_final_state=output_final_state)
    return result if isinstance(result, tuple) else (result, None)


@pytest.mark.parametrize("ours", [token_recurrence, local], ids=["oracle", "linear_attention"])
@pytest.mark.parametrize(
    ("function", "decay"), [(function, decay) for function, (decays, *_) in NAIVE.items() for decay in decays]
)
def test_flash_linear_attention_says_the_same(function: str, decay: str, ours: Callable[..., Any]) -> None:
    """Output, final state and every gradient. Theirs compute in fp32."""
    _, make, states = NAIVE[function]
    # kda's alone share query heads. Whole chunks of theirs, of which some are of 32 and some of 64.
    shape = {"heads": 4, "kv_heads": 2} if decay == "kda" else {}
    tensors = drawn(decay, dtype=torch.float32, length=128, states=states, **shape)
    asked = {"output_final_state": True} if states else {}
    theirs = differentiated(make(), tensors, **asked)
    got = differentiated(ours, tensors, **({} if ours is token_recurrence else asked))
    assert got.keys() == theirs.keys()
    for name, want in theirs.items():
        error = (got[name].double() - want.double()).abs().max() / want.double().abs().max()
        assert error <= 1e-4, (name, error)


def test_nothing_of_flash_linear_attention_is_imported() -> None:
    # Transformers' hybrids import it where it is installed, in other tests.
    before = {name for name in sys.modules if name == "fla" or name.startswith("fla.")}
    naive.__wrapped__("kda")
    assert {name for name in sys.modules if name == "fla" or name.startswith("fla.")} == before
