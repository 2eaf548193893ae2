"""Stages of a `PipelineModule`, and AutoTP's ranks, beside sequence groups: training equals that of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from deepspeed_cases import Trained
from grid_cases import MICRO, STEPS, WORLD, GridCase, cases, pipeline_alone, tensor_parallel_alone

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5
ALONE = {"pipeline": pipeline_alone, "autotp": tensor_parallel_alone}
FEATURES = {"pipeline": "PipelineModule, ZeRO", "autotp": "AutoTP, ZeRO"}


def params() -> Iterator[Any]:
    """A parameter set for every run, with its cell."""
    for case, covering in cases():
        marks = [pytest.mark.cell("deepspeed", case.method, f"{FEATURES[case.kind]} {case.zero}")]
        if not covering:
            marks.append(pytest.mark.matrix)
        yield pytest.param(case, id=case.name, marks=marks)


@cache
def alone(case: GridCase) -> Trained:
    """The unsharded run."""
    return ALONE[case.kind](case)


@pytest.mark.parametrize("case", list(params()))
def test_training_equals_the_unsharded_run(case: GridCase, grid_world: Callable[[int], Any]) -> None:
    """The loss of every step on every rank, every gradient of the first step, and what is counted."""
    world, expected = grid_world(WORLD), alone(case)
    results = world.results(case.name)
    for result in results:
        assert result["losses"] == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
        assert result["samples"] == STEPS * case.accumulation * MICRO
    assert sum(result["sent"] for result in results) > 0, "the sequence was not sharded"

    found = gradients(case, world)
    assert found.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        for copy in found[name]:
            error = (copy - gradient).abs().max() / gradient.abs().max()
            assert error < GRADIENT_TOLERANCE, f"{name}: {error:.1e}"


def gradients(case: GridCase, world: Any) -> dict[str, list[torch.Tensor]]:
    """By name, as every rank has them whose file there is."""
    found: dict[str, list[torch.Tensor]] = {}
    for path in sorted(world.folder.glob(f"{case.name}.*pt")):
        for name, gradient in torch.load(path).items():
            found.setdefault(name, []).append(gradient)
    return found


@pytest.mark.parametrize("case", [case for case in params() if case.values[0].kind == "pipeline"])
def test_evaluation_sees_one_loss(case: GridCase, grid_world: Callable[[int], Any]) -> None:
    """`eval_batch` of the first step's data after training: lower than before, the same on all ranks."""
    results = grid_world(WORLD).results(case.name)
    assert {result["evaluated"] for result in results} == {results[0]["evaluated"]}
    assert results[0]["evaluated"] < alone(case).losses[0]


@pytest.mark.parametrize("case", [case for case in params() if case.values[0].recompute])
def test_attention_runs_again_only_where_told(case: GridCase, grid_world: Callable[[int], Any]) -> None:
    """Forward kernels of one `train_batch`, by micro batch: more than once only where attention is recomputed."""
    # A layer's attention in a ring of two, zigzag, is five blocks; that of Ulysses is one.
    kept = 5 if case.method == "ring" else 1
    for result in grid_world(WORLD).results(case.name):
        once = result["forwards"] / case.accumulation
        assert once > kept if case.recompute == "full" else once <= kept, once


def test_deepspeed_still_averages_over_all_data_parallel_ranks(grid_world: Callable[[int], Any]) -> None:
    """What counts replicas while an engine is built is put back: the loss of a step is a mean over sequence peers."""
    for case, covering in cases():
        if case.kind == "pipeline" and covering:
            assert all(result["grid"] == [2, 2] for result in grid_world(WORLD).results(case.name))
