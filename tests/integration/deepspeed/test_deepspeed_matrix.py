"""Every method under every feature of DeepSpeed trains as one process does: docs/compatibility.md holds the cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from deepspeed_cases import Case
from matrix_cases import WORLD, matrix
from test_deepspeed_parity import assert_equal_to_unsharded, reference


def runs() -> Iterator[Any]:
    """A parameter set for every run."""
    for cells in matrix():
        marks = [pytest.mark.cell("deepspeed", cells.case.method, feature) for feature in cells.features]
        if not cells.covering:
            marks.append(pytest.mark.matrix)
        yield pytest.param(cells.case, id=cells.case.name, marks=marks)


@pytest.mark.parametrize("case", list(runs()))
def test_training_equals_the_unsharded_run(case: Case, matrix_world: Callable[[int], Any]) -> None:
    """Losses of every step, every gradient of the first and gradient norms; bf16 stays within bf16's own noise."""
    if case.dtype == "bf16":
        assert_within_the_noise_of_bf16(case, matrix_world(WORLD))
    else:
        assert_equal_to_unsharded(case, matrix_world(WORLD))


def assert_within_the_noise_of_bf16(case: Case, world: Any) -> None:
    """Sharding moves the bf16 curve and the gradients no farther than bf16 itself moves them from fp32."""
    exact, unsharded = reference(replace(case, dtype="fp32")), reference(case)
    noise = max(abs(a - b) for a, b in zip(exact.losses, unsharded.losses, strict=True))
    found = world.results(case.name)[0]["losses"]
    assert max(abs(a - b) for a, b in zip(found, unsharded.losses, strict=True)) <= 3 * noise

    gradients = world.gradients(case.name)
    for name, gradient in exact.gradients.items():
        assert _error(gradients[name], gradient) < max(3 * _error(unsharded.gradients[name], gradient), 2e-2), name


def _error(found: torch.Tensor | None, exact: torch.Tensor) -> float:
    assert found is not None
    return ((found - exact).norm() / exact.norm()).item()
