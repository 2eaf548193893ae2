"""The short convolution, whole and in runs: against its definition, and visible to a torch function mode."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.kernels.convolution import short_convolution, with_halo

pytestmark = pytest.mark.timeout(60)
BATCH, TOKENS, CHANNELS = 2, 11, 3
BORDERS = [None, (0, 11), (0, 1, 2, 5, 5, 8, 11), (0, 0, 7, 11, 11)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def by_definition(x: Tensor, weight: Tensor, bias: Tensor | None, borders: tuple[int, ...] | None) -> Tensor:
    """Token by token, tap by tap."""
    width, rows = weight.shape[1], []
    for start, stop in pairwise(borders or (0, x.shape[1])):
        for token in range(start, stop):
            row = torch.zeros_like(x[:, 0]) if bias is None else bias.expand(x.shape[0], -1)
            for back in range(min(width, token - start + 1)):
                row = row + x[:, token - back] * weight[:, width - 1 - back]
            rows.append(row)
    return torch.stack(rows, 1)


def leaves(width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(BATCH, TOKENS, CHANNELS), (CHANNELS, width), (CHANNELS,)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("width", [1, 2, 4, 14])
@pytest.mark.parametrize("with_bias", [True, False])
def test_is_what_its_definition_says_and_so_are_its_gradients(width, borders, with_bias):
    x, weight, bias = leaves(width)
    inputs = [x, weight, bias][: 2 + with_bias]
    out = short_convolution(*inputs, cu_seqlens=borders)
    expected = by_definition(x, weight, bias if with_bias else None, borders)
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(expected)
    for got, wanted in zip(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("borders", BORDERS)
def test_runs_of_tokens_with_their_halo_make_up_the_whole(borders):
    x, weight, bias = leaves(4)
    padded = torch.cat([x.new_zeros(BATCH, 3, CHANNELS), x], 1)
    runs = [
        with_halo(padded[:, start : start + 3], x[:, start:stop], weight, bias, first=start, borders=borders)
        for start, stop in [(0, 1), (1, 1), (1, 6), (6, 11)]
    ]
    torch.testing.assert_close(torch.cat(runs, 1), short_convolution(x, weight, bias, cu_seqlens=borders))


def test_no_tokens_still_make_a_function_of_the_halo():
    """Whoever holds the halo's tokens waits for their gradient."""
    x, weight, _ = leaves(4)
    out = with_halo(x[:, :3], x[:, :0], weight, first=3)
    assert out.shape == (BATCH, 0, CHANNELS)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros_like(x))


def test_borders_may_be_a_tensor():
    x, weight, bias = leaves(4)
    packed = short_convolution(x, weight, bias, cu_seqlens=torch.tensor(BORDERS[2], dtype=torch.int32))
    assert torch.equal(packed, short_convolution(x, weight, bias, cu_seqlens=BORDERS[2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_documents_loses_no_more_than_rounding(dtype):
    x, weight, bias = (t.detach() for t in leaves(4, dtype))
    borders = BORDERS[2]
    out = short_convolution(x, weight, bias, cu_seqlens=borders)
    expected = by_definition(x.double(), weight.double(), bias.double(), borders)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected.to(dtype))


@pytest.mark.parametrize("borders", BORDERS[::2])
def test_autocast_computes_in_its_dtype_with_and_without_documents(borders):
    x, weight, bias = (t.float() for t in leaves(4))
    with torch.autocast("cpu", torch.bfloat16):
        out = short_convolution(x.bfloat16(), weight, bias, cu_seqlens=borders)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), by_definition(x, weight, bias, borders), atol=0.05, rtol=0.05)


class Watch(TorchFunctionMode):
    """Doubles what the convolution returns, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is short_convolution:
            self.seen.append(kwargs or {})
            return 2 * out
        return out


def test_a_torch_function_mode_sees_the_call_and_can_serve_it():
    x, weight, bias = (t.detach() for t in leaves(4))
    # As in a model: parameters answer has_torch_function differently from plain tensors.
    weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    plain = short_convolution(x, weight, bias, cu_seqlens=BORDERS[2])
    with Watch() as outer, Watch() as inner:
        out = short_convolution(x, weight, bias, cu_seqlens=BORDERS[2])
    torch.testing.assert_close(out, 4 * plain)
    assert outer.seen == inner.seen == [{"cu_seqlens": BORDERS[2]}]


@pytest.mark.parametrize(
    ("x", "weight", "bias", "borders", "message"),
    [
        ((2, 5, 3), (4, 2), None, None, "takes a weight"),
        ((2, 5, 3), (3, 1, 2), None, None, "middle dim of an nn.Conv1d"),
        ((2, 5, 3), (3, 0), None, None, "W >= 1"),
        ((5, 3), (3, 2), None, None, "x \\[B, n, C\\]"),
        ((2, 5, 3), (3, 2), (4,), None, "one for each of 3 channels"),
        ((2, 5, 3), (3, 2), None, (0, 4), "last border is 4"),
        ((2, 5, 3), (3, 2), None, (1, 5), "start at 0"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(x, weight, bias, borders, message):
    with pytest.raises(SequenceParallelConfigError, match=message):
        short_convolution(
            torch.zeros(x), torch.zeros(weight), None if bias is None else torch.zeros(bias), cu_seqlens=borders
        )
