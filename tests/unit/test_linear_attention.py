"""`linear_attention` in one process equals the token recurrence: output, final state and every gradient."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.kernels.linear import DECAYS, linear_attention
from dsp_plugin.kernels.linear_reference import token_recurrence
from dsp_plugin.mask import MaskSpec
from dsp_plugin.verification import Case
from dsp_plugin.verification.linear import draw

pytestmark = pytest.mark.timeout(60)

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
GATED = ("head", "scalar", "vector", "gated-delta", "kda")


def drawn(decay: str, **fields: Any) -> dict[str, Tensor]:
    """Inputs, the output's gradient, and with states the gradient ``dfinal [B, H, K, V]`` of the one final state."""
    shape = {"batch": 2, "heads": 4, "kv_heads": 2, "length": 37, "head_dim": 16, "value_dim": 12}
    case = Case("lasp", 1, decay=decay, mask=MaskSpec(causal=True), **{"dtype": torch.float64, **shape, **fields})
    tensors = draw(case)
    return tensors | ({"dfinal": tensors["dfinal"][0]} if case.states else {})


def differentiated(attend: Any, tensors: dict[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """Output, final state if there is a gradient for one, and the gradients of all inputs."""
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items() if n not in ("dout", "dfinal")}
    result = attend(**leaves, **settings)
    out, state = result if isinstance(result, tuple) else (result, None)
    outputs, incoming, results = [out], [tensors["dout"].to(out.dtype)], {"out": out.detach()}
    if "dfinal" in tensors:
        outputs, incoming = [*outputs, state], [*incoming, tensors["dfinal"].to(state.dtype)]
        results["state"] = state.detach()
    grads = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    return results | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def error(got: Tensor, want: Tensor, nothing: float = 1.0) -> float:
    """Relative to the largest value expected; to ``nothing`` where that is zero but for rounding."""
    assert got.shape == want.shape
    peak = want.abs().max().item()
    return ((got.double() - want).abs().max() / (peak if peak > 1e-9 else nothing)).item()


def compare(tensors: dict[str, Tensor], limit: float, **settings: Any) -> None:
    asked = {"output_final_state": True} if "dfinal" in tensors else {}
    got = differentiated(linear_attention, tensors, **settings, **asked)
    want = differentiated(token_recurrence, {name: x.double() for name, x in tensors.items()}, **settings)
    peak = max(x.abs().max().item() for x in want.values())
    errors = {name: error(got[name], want[name], nothing=peak) for name in want}
    assert all(e <= limit for e in errors.values()), errors


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("decay", DECAYS)
def test_any_length(decay: str, length: int, dtype: torch.dtype) -> None:
    compare(drawn(decay, length=length, dtype=dtype, states=True), LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_without_states(decay: str, dtype: torch.dtype) -> None:
    compare(drawn(decay, length=70, dtype=dtype), LIMITS[dtype])


# Of documents: one per token, chunks that end where a document does, and borders without tokens between.
PACKED = [(37,), (5, 1, 31), (1,) * 9, (64, 64, 3), (0, 3, 0, 0, 70, 0), (130, 1, 1, 66)]


@pytest.mark.parametrize("lengths", PACKED, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_packed_documents(decay: str, lengths: tuple[int, ...]) -> None:
    tensors = drawn(decay, length=sum(lengths), states=True)
    compare(tensors, LIMITS[torch.float64], cu_seqlens=(0, *accumulate(lengths)))


def test_borders_may_be_a_tensor() -> None:
    x = drawn("kda")
    del x["dout"]
    borders = (0, 7, 37)
    assert torch.equal(
        linear_attention(**x, cu_seqlens=torch.tensor(borders, dtype=torch.int32)),
        linear_attention(**x, cu_seqlens=borders),
    )


@pytest.mark.parametrize("heads", [(1, 1), (5, 5), (6, 1), (6, 3)])
@pytest.mark.parametrize(("k_dim", "v_dim"), [(1, 1), (3, 20), (24, 5), (64, 64)])
@pytest.mark.parametrize("decay", DECAYS)
def test_any_heads_and_dims(decay: str, heads: tuple[int, int], k_dim: int, v_dim: int) -> None:
    tensors = drawn(
        decay, heads=heads[0], kv_heads=heads[1], head_dim=k_dim, value_dim=v_dim, length=9, batch=3, states=True
    )
    compare(tensors, LIMITS[torch.float64])


@pytest.mark.parametrize("gates", ["strong", "weak"])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("decay", GATED)
def test_strong_and_weak_decays(decay: str, dtype: torch.dtype, gates: str) -> None:
    tensors = drawn(decay, length=201, dtype=dtype, gates=gates, states=True)
    if gates == "strong":
        assert tensors["g"].min() < -15
    compare(tensors, LIMITS[dtype])


@pytest.mark.parametrize("value", [-30.0, -200.0, -1e4])
@pytest.mark.parametrize("decay", GATED)
def test_a_decay_to_nothing_is_no_nan_anywhere(decay: str, value: float) -> None:
    """What is left is each token by itself: exponents that are far below what fp32 has."""
    tensors = drawn(decay, length=150, dtype=torch.float32, states=True)
    tensors["g"] = torch.full_like(tensors["g"], value)
    compare(tensors, LIMITS[torch.float32])


@pytest.mark.parametrize("decay", [decay for decay in GATED if decay != "head"])
def test_a_token_that_forgets_all_between_tokens_that_forget_nothing(decay: str) -> None:
    tensors = drawn(decay, length=150, dtype=torch.float32, states=True)
    tensors["g"] = torch.zeros_like(tensors["g"])
    tensors["g"][:, 70] = -500.0
    compare(tensors, LIMITS[torch.float32])


@pytest.mark.parametrize("decay", DECAYS)
def test_a_long_shard_in_fp32(decay: str) -> None:
    fields = {"batch": 1, "heads": 2, "kv_heads": 1, "head_dim": 16, "value_dim": 16, "dtype": torch.float32}
    x = drawn(decay, length=4096, gates="weak", states=True, **fields)
    given = {name: y for name, y in x.items() if name not in ("dout", "dfinal")}
    with torch.no_grad():
        out, state = linear_attention(**given, output_final_state=True)
        want_out, want_state = token_recurrence(**given)
    assert want_state is not None
    assert error(out, want_out) <= 1e-5
    assert error(state, want_state) <= 1e-5


@pytest.mark.parametrize("lengths", [None, (37,), (5, 1, 31), (0, 30, 0, 7)])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_bidirectional(dtype: torch.dtype, lengths: tuple[int, ...] | None) -> None:
    borders = None if lengths is None else (0, *accumulate(lengths))
    compare(drawn("none", dtype=dtype), LIMITS[dtype], causal=False, cu_seqlens=borders)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_head_decay_serves_the_delta_rule_too_and_a_scale_is_a_factor(decay: str) -> None:
    tensors = drawn(decay, states=True)
    if decay == "delta":
        tensors["g"] = torch.tensor([-0.1, -1.0, 0.0, -3.0], dtype=torch.float64)
    compare(tensors, LIMITS[torch.float64], scale=0.7)


@pytest.mark.parametrize("decay", DECAYS)
def test_16_bits_in_and_out_and_fp32_between(decay: str) -> None:
    """Rounding the output is all that is lost forward; gradients come back in the dtype of what they are for."""
    tensors = drawn(decay, length=130, dtype=torch.bfloat16, states=True)
    got = differentiated(linear_attention, tensors, output_final_state=True)
    want = differentiated(token_recurrence, {name: x.double() for name, x in tensors.items()})
    assert got["out"].dtype == torch.bfloat16
    assert got["state"].dtype == torch.float32
    assert error(got["out"], want["out"]) <= 2**-8
    assert error(got["state"], want["state"]) <= 1e-5
    for name in tensors.keys() - {"dout", "dfinal"}:
        assert got[f"d{name}"].dtype == tensors[name].dtype
        assert error(got[f"d{name}"], want[f"d{name}"]) <= (2**-8 if tensors[name].dtype == torch.bfloat16 else 1e-5)


def test_gradients_only_where_they_are_wanted() -> None:
    x = drawn("kda", states=True)
    given = {name: y for name, y in x.items() if name not in ("dout", "dfinal")}
    given["beta"].requires_grad_()
    linear_attention(**given).sum().backward()
    assert given["beta"].grad is not None
    assert not linear_attention(**{name: y.detach() for name, y in given.items()}).requires_grad
    state = linear_attention(**given, output_final_state=True)[1]
    (alone,) = torch.autograd.grad(state.sum(), given["beta"])
    want = token_recurrence(**given)[1]
    assert want is not None
    torch.testing.assert_close(alone, torch.autograd.grad(want.sum(), given["beta"])[0], rtol=1e-10, atol=1e-10)


def test_inputs_are_left_as_they_were() -> None:
    x = drawn("kda", states=True)
    before = {name: y.clone() for name, y in x.items()}
    differentiated(linear_attention, x, output_final_state=True)
    assert all(torch.equal(x[name], before[name]) for name in x)


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_torch_function_mode_sees_the_call() -> None:
    x = drawn("delta")
    del x["dout"]
    watch = _Watch()
    with watch:
        linear_attention(**x)
    assert linear_attention in watch.seen


@pytest.mark.parametrize(
    ("decay", "change", "error_type", "words"),
    [
        ("scalar", {"causal": False}, UnsupportedError, "only causal attention"),
        ("delta", {"causal": False}, UnsupportedError, "only causal attention"),
        ("none", {"causal": False, "output_final_state": True}, UnsupportedError, "only causal attention"),
        ("none", {"cu_seqlens": (0, 36)}, SequenceParallelConfigError, "last border is 36"),
        ("none", {"k": torch.zeros(2, 37, 2, 8)}, SequenceParallelConfigError, "expected q and k"),
        ("none", {"beta": torch.zeros(2, 37, 2)}, SequenceParallelConfigError, "expected q and k"),
        ("none", {"g": torch.zeros(2)}, SequenceParallelConfigError, "expected q and k"),
        ("none", {"initial_state": torch.zeros(2, 4, 12, 16)}, SequenceParallelConfigError, "expected q and k"),
        ("none", {"kernel": "chunk"}, SequenceParallelConfigError, "'chunked'|chunked"),
    ],
)
def test_what_does_not_fit_is_refused(
    decay: str, change: dict[str, Any], error_type: type[Exception], words: str
) -> None:
    x = drawn(decay)
    del x["dout"]
    with pytest.raises(error_type, match=words):
        linear_attention(**(x | change))
