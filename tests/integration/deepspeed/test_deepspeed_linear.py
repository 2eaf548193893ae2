"""The linear language model under DeepSpeed: ``{"method": "lasp", "size": P}`` trains it as one process does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from linear_cases import LinearCase, linear_cases
from test_deepspeed_parity import assert_equal_to_unsharded

WORLDS = (2, 3, 4)
CASES = [case for world in WORLDS for case in linear_cases(world)]
# Four ranks of linear attention in the covering subset: the tests of the method.
CHOSEN = [pytest.param(case, id=case.name, marks=[pytest.mark.matrix] if case.world == 4 else []) for case in CASES]


@pytest.mark.parametrize("case", CHOSEN)
def test_training_equals_the_unsharded_run(case: LinearCase, linear_world: Callable[[int], Any]) -> None:
    """Losses, gradients and norms; over a checkpoint that another number of ranks per sequence goes on from, too."""
    assert_equal_to_unsharded(case, linear_world(case.world))


@pytest.mark.parametrize("case", CHOSEN)
def test_attention_runs_again_only_where_checkpointing_is_told_so(
    case: LinearCase, linear_world: Callable[[int], Any]
) -> None:
    """Forward kernels of attention during the backward pass."""
    for result in linear_world(case.world).results(case.name):
        assert (result["again"] > 0) == (case.recompute == "full")


def test_the_cases_cover_what_they_should() -> None:
    """Every model, exchange and ZeRO stage in every world; every model under every stage; both kinds of softmax."""
    for world in WORLDS:
        cases = linear_cases(world)
        assert {case.zero for case in cases} == {0, 1, 2, 3}
        assert {"head", "gated-delta", "vector", "hybrid"} <= {case.model for case in cases}
        assert {"ring", "allgather", "scan"} <= {case.exchange for case in cases}
        assert {"lightseq", "ulysses"} <= {case.softmax_method for case in cases}
    for model in ("head", "gated-delta", "hybrid"):
        assert {case.zero for case in CASES if case.model == model} == {0, 1, 2, 3}
    assert {case.zero for case in CASES if case.then} == {1, 3}
