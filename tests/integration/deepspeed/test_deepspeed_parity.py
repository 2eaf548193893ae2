"""DeepSpeed with the sequence sharded trains as one process without DeepSpeed does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from deepspeed_cases import MICRO, Case, Trained, parity_cases, train_alone

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5
PARITY = [case for world in (2, 3, 4) for case in parity_cases(world)]


def reference(case: Case) -> Trained:
    """The unsharded run."""
    return _reference(case.unsharded())


@cache
def _reference(case: Case) -> Trained:
    return train_alone(case)


@pytest.mark.parametrize("case", PARITY, ids=lambda case: case.name)
def test_training_equals_the_unsharded_run(case: Case, world: Callable[[int], Any]) -> None:
    """Losses of every step, every gradient of the first, and gradient norms where DeepSpeed reports them."""
    assert_equal_to_unsharded(case, world(case.world))


def assert_equal_to_unsharded(case: Case, world: Any) -> None:
    """What a world recorded of a case is what the unsharded run gives."""
    expected, results = reference(case), world.results(case.name)
    for result in results:
        assert result["losses"] == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
        # DeepSpeed computes no norm without ZeRO.
        if case.zero:
            assert result["norms"] == pytest.approx(expected.norms, rel=GRADIENT_TOLERANCE)
        assert result["sent"] > 0, "the sequence was not sharded"
        assert result["samples"] == case.steps * case.accumulation * MICRO * case.replicas

    gradients = world.gradients(case.name)
    assert gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        found = gradients[name]
        assert found is not None, name
        error = (found - gradient).abs().max() / gradient.abs().max()
        assert error < GRADIENT_TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", PARITY, ids=lambda case: case.name)
def test_sequence_peers_see_one_loss(case: Case, world: Callable[[int], Any]) -> None:
    """A script that logs its loss logs the same on all peers."""
    local = [result["local"] for result in world(case.world).results(case.name)]
    for first in range(0, case.world, case.size):
        assert all(losses == local[first] for losses in local[first : first + case.size])
