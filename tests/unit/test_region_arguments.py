"""Arguments of a call, found by the names and positions that plans use."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from dsp_plugin import SequenceParallelConfigError
from dsp_plugin.sharding.arguments import Arguments


class Block(nn.Module):
    def forward(self, x: int, rope: int = 2, causal: bool = True) -> int:
        return x + rope


class Wrapped(nn.Module):
    def forward(self, x: int, *args: int, **kwargs: int) -> int:
        return x


def arguments(module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
    return Arguments("block", module, args, kwargs)


def test_names_and_positions_mean_the_same():
    call = arguments(Block(), 1, 5)
    assert [call.get(0), call.get("x"), call.get(1), call.get("rope")] == [1, 1, 5, 5]
    call.set("rope", 7)
    call.set("causal", False)
    assert (call.args, call.kwargs) == ((1, 7), {"causal": False})
    assert arguments(Block(), x=1).get(0) == 1
    with pytest.raises(SequenceParallelConfigError, match="takes x, rope, causal"):
        call.get("mask")


def test_conditions_see_what_was_given_and_else_the_defaults():
    given, left_out = arguments(Block(), 1, 5, causal=False), arguments(Block(), 1)
    assert [call.hold(None) for call in (given, left_out)] == [True, True]
    assert [call.hold("causal") for call in (given, left_out)] == [False, True]
    assert [call.hold(lambda by_name: by_name["rope"] == 5) for call in (given, left_out)] == [True, False]


def test_a_name_that_may_be_any_of_the_positions_is_refused_and_not_taken_for_left_out():
    assert arguments(Wrapped(), 1).get("rope") is None
    assert arguments(Wrapped(), 1, 5, rope=6).get("rope") == 6
    with pytest.raises(SequenceParallelConfigError, match=r"takes x: .*\*args.* was given 2 arguments by position"):
        arguments(Wrapped(), 1, 5).get("rope")
