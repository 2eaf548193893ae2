"""`torch.compile` of a model, of its layers, by the engine, of a whole step: the numbers of the run without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hf_compiled import CASES, LENGTHS, MATRIX, SETTLED, train_alone

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(700)]
ALL = {**CASES, **MATRIX}


def _marked() -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.matrix] if name in MATRIX else []) for name in ALL]


@pytest.mark.parametrize("name", _marked())
def test_training_equals_the_unsharded_uncompiled_run(name: str, hf_world: Callable[..., Any]) -> None:
    """Losses of every step, and every gradient of the first."""
    expected, world = train_alone(ALL[name]), hf_world(2, "compiled")
    for result in world.results(f"compiled-{name}"):
        assert result["losses"] == pytest.approx(expected.losses, rel=1e-5)
    gradients = world.gradients(f"compiled-{name}")
    assert gradients.keys() == expected.gradients.keys()
    for key, gradient in expected.gradients.items():
        assert (gradients[key] - gradient).abs().max() <= 2e-5 * gradient.abs().max(), key


@pytest.mark.parametrize("name", _marked())
def test_nothing_is_compiled_again_for_another_step_or_length(name: str, hf_world: Callable[..., Any]) -> None:
    for result in hf_world(2, "compiled").results(f"compiled-{name}"):
        graphs = result["graphs"]
        assert len(graphs) == len(LENGTHS)
        assert (graphs[0] > 0) == ALL[name].compiles
        # The last length leaves one rank a tile of one token, and a dim of one is compiled by itself.
        alone = 1 if ALL[name].memory else 0
        assert set(graphs[SETTLED:-1]) == {graphs[SETTLED]}
        assert 0 <= graphs[-1] - graphs[SETTLED] <= alone


@pytest.mark.parametrize("how", ["layer", "model"])
def test_one_graph_is_refused_with_the_remedy(how: str, hf_world: Callable[..., Any]) -> None:
    for result in hf_world(2, "compiled").results(f"fullgraph-{how}"):
        (said,) = [line for line in result["said"].splitlines() if "dsp_plugin exchanges tokens" in line][:1]
        assert "leave out fullgraph=True, or compile parts of the model in which nothing is exchanged" in said


def test_one_graph_of_a_part_without_exchanges_is_compiled(hf_world: Callable[..., Any]) -> None:
    for result in hf_world(2, "compiled").results("fullgraph-parts"):
        assert result["error"] < 1e-6
        assert result["graphs"] > 0
