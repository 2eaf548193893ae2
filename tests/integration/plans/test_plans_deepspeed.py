"""Other people's models under DeepSpeed, sharded by nothing but the section of the config."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from plans_deepspeed_worker import RUNS, Run, train_alone

HERE = Path(__file__).parent
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-5
# Of the largest: the gradient of the bias of keys is zero but for rounding.
SMALLEST_GRADIENT = 1e-3

pytestmark = pytest.mark.deepspeed
pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of results of one world that trains everything: starting DeepSpeed costs more than training does."""
    sys.path.insert(0, str(HERE.parent / "deepspeed"))
    from deepspeed_world import run_ranks

    folder = tmp_path_factory.mktemp("plans_deepspeed")
    run_ranks([str(HERE / "plans_deepspeed_worker.py"), str(folder)], 2, folder, 240)
    return folder


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_flag_trains_the_model_as_one_process_does(run: Run, trained: Path) -> None:
    expected, found = train_alone(run), torch.load(trained / f"{run.name}.pt")
    assert found["sent"] > 0, "the sequence was not sharded"
    assert found["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE)
    wanted: dict[str, Any] = expected["gradients"]
    assert found["gradients"].keys() == wanted.keys()
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = max(gradient.abs().max(), SMALLEST_GRADIENT * largest)
        error = (found["gradients"][name] - gradient).abs().max() / scale
        assert error < GRADIENT_TOLERANCE, f"{name}: {error:.1e}"
