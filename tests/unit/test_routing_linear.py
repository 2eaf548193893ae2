"""Which calls inside a routed module go where: linear attention, short convolutions, softmax attention beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_plugin import Layout, SequenceParallelGroups, UnsupportedError
from dsp_plugin.kernels.convolution import short_convolution
from dsp_plugin.kernels.linear import linear_attention
from dsp_plugin.methods import halo
from dsp_plugin.methods.method import Where
from dsp_plugin.sharding.routing import AttentionRoute

BATCH, LENGTH, HEADS, KEY_DIM, VALUE_DIM, TAPS = 2, 5, 3, 4, 6, 3
LAYOUT = Layout("contiguous", LENGTH, 1)
GROUPS = SequenceParallelGroups.single()


class Recorded:
    """Stands for a method's attention: keeps what it was called with and returns the values."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *tensors: Any, **settings: Any) -> Tensor:
        self.calls.append((tensors, settings))
        return tensors[2]


class Mixer(nn.Module):
    """Calls what it is told to."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *inputs: Any, **settings: Any) -> Any:
        return self.call(*inputs, **settings)


class Routed:
    """A module with its calls recorded."""

    def __init__(self, call: Callable[..., Any], linear: bool = True, layout: Layout | None = LAYOUT) -> None:
        self.softmax, self.linear = Recorded(), Recorded()
        self.module = Mixer(call)
        route = AttentionRoute(
            "layers.0.mixer", self.softmax, GROUPS, lambda: layout, lambda: None, self.linear if linear else None
        )
        self.undo = route.install(self.module)

    @property
    def served(self) -> tuple[int, int]:
        """How many calls of softmax attention and of linear attention were sent to the method."""
        return len(self.softmax.calls), len(self.linear.calls)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v, vector decays and beta."""
    q, k = (torch.randn(BATCH, LENGTH, HEADS, KEY_DIM, dtype=dtype) for _ in range(2))
    v = torch.randn(BATCH, LENGTH, HEADS, VALUE_DIM, dtype=dtype)
    return q, k, v, -torch.rand(BATCH, LENGTH, HEADS, KEY_DIM), torch.rand(BATCH, LENGTH, HEADS)


def softmax(*_: Any) -> Tensor:
    q, k, v, *_ = (x.transpose(1, 2) for x in inputs()[:3])
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_linear_attention_goes_to_the_method_with_all_that_it_was_given():
    routed = Routed(linear_attention)
    given = (*inputs(), torch.randn(BATCH, HEADS, KEY_DIM, VALUE_DIM))
    settings = {"scale": 0.3, "cu_seqlens": (0, 2, LENGTH), "output_final_state": True, "kernel": "chunked"}
    assert routed.module(*given, **settings) is given[2]
    assert routed.served == (0, 1)
    tensors, found = routed.linear.calls[0]
    assert all(ours is theirs for ours, theirs in zip(tensors, given, strict=True))
    assert found == {"where": Where(GROUPS, LAYOUT), "causal": True, **settings}


def test_gates_given_by_name_arrive():
    q, k, v, g, beta = inputs()
    routed = Routed(linear_attention)
    routed.module(q, k, v=v, beta=beta, g=g)
    *tensors, state = routed.linear.calls[0][0]
    assert all(ours is theirs for ours, theirs in zip(tensors, (q, k, v, g, beta), strict=True))
    assert state is None


def test_a_hybrid_module_may_call_both():
    def both(*given: Tensor) -> Tensor:
        softmax()
        return linear_attention(*given)

    routed = Routed(both)
    routed.module(*inputs())
    assert routed.served == (1, 1)


def test_outside_a_sharded_pass_and_after_removal_nothing_is_routed():
    given = inputs()
    expected = linear_attention(*given)
    whole = Routed(linear_attention, layout=None)
    torch.testing.assert_close(whole.module(*given), expected, rtol=0, atol=0)
    removed = Routed(linear_attention)
    removed.undo()
    torch.testing.assert_close(removed.module(*given), expected, rtol=0, atol=0)
    assert whole.served == removed.served == (0, 0)


@pytest.mark.parametrize("linear", [True, False])
def test_a_short_convolution_goes_to_the_halo_whatever_the_method(linear, monkeypatch):
    seen: list[dict[str, Any]] = []
    convolve = halo.convolve

    def recorded(*tensors: Tensor | None, **settings: Any) -> Tensor:
        seen.append(settings)
        return convolve(*tensors, **settings)

    monkeypatch.setattr(halo, "convolve", recorded)

    def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = short_convolution(x, weight, bias, cu_seqlens=(0, 2, LENGTH))
        softmax()
        return out

    routed = Routed(convolved, linear=linear)
    given = torch.randn(BATCH, LENGTH, 7), torch.randn(7, TAPS), torch.randn(7)
    out = routed.module(*given)
    torch.testing.assert_close(out, short_convolution(*given, cu_seqlens=(0, 2, LENGTH)))
    assert seen == [{"groups": GROUPS, "layout": LAYOUT, "cu_seqlens": (0, 2, LENGTH)}]


@pytest.mark.parametrize("call", [lambda x: x + 1, lambda x: short_convolution(x, torch.ones(7, TAPS))])
def test_a_module_that_attends_out_of_sight_is_refused(call):
    with pytest.raises(UnsupportedError) as refused:
        Routed(call).module(torch.randn(BATCH, LENGTH, 7))
    for part in ("layers.0.mixer", "scaled_dot_product_attention", "linear_attention", "within the shard only"):
        assert part in str(refused.value)


def test_linear_attention_under_a_softmax_method_says_what_to_set():
    with pytest.raises(UnsupportedError) as refused:
        Routed(linear_attention, linear=False).module(*inputs())
    for part in ("linear_attention of layers.0.mixer", 'Set "method" to "lasp"', "softmax_method"):
        assert part in str(refused.value)


def test_a_convolution_of_tokens_out_of_order_is_refused():
    scattered = Layout.of_sizes([LENGTH])
    with pytest.raises(UnsupportedError) as refused:
        Routed(lambda x: short_convolution(x, torch.ones(7, TAPS)), layout=scattered).module(
            torch.randn(BATCH, LENGTH, 7)
        )
    for part in ("short_convolution of layers.0.mixer", "not in global order", "leave it out"):
        assert part in str(refused.value)


def test_autocast_rounds_queries_keys_and_values_but_no_gate():
    routed = Routed(linear_attention)
    state = torch.randn(BATCH, HEADS, KEY_DIM, VALUE_DIM)
    with torch.autocast("cpu", torch.bfloat16):
        routed.module(*inputs(), state)
    dtypes = [tensor.dtype for tensor in routed.linear.calls[0][0]]
    assert dtypes == [torch.bfloat16] * 3 + [torch.float32] * 3
    exact = Routed(linear_attention)
    with torch.autocast("cpu", torch.bfloat16):
        exact.module(*inputs(torch.float64))
    assert [tensor.dtype for tensor in exact.linear.calls[0][0][:3]] == [torch.float64] * 3
