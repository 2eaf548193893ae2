"""PEFT's adapters under DeepSpeed train, merge and save as they do alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import LENGTH
from hf_peft import ADAPTED, ALPHA, COVERING, SAVED, train_alone
from safetensors.torch import load_file

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 1e-5


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each within a part of its own largest."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].float() - value.float()).abs().max() / value.abs().max()
        assert error < WEIGHT_TOLERANCE, f"{name}: {error:.1e}"


def settings(path: Path) -> dict[str, Any]:
    """A config; PEFT writes sets in any order."""
    read = json.loads(path.read_text())
    return {name: sorted(value) if isinstance(value, list) else value for name, value in read.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in COVERING else pytest.mark.matrix) for name in ADAPTED]
)
def test_adapters_train_and_save_as_alone(name: str, hf_world: Callable[..., Any], tmp_path: Path) -> None:
    """Losses of every step, the trained weights, and the files of the adapter and of the model merged with it."""
    case, world = ADAPTED[name], hf_world(2, "living")
    expected, results = train_alone(case, tmp_path if name in SAVED else None), world.results(f"peft-{name}")
    for result in results:
        assert result["losses"] == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
        # A prompt is embedded with the tokens, before they are cut.
        embedded = {LENGTH} if case.adapter().is_prompt_learning else {7, 6}
        assert set(result["lengths"]) <= embedded
    assert_close(torch.load(world.folder / f"peft-{name}.pt"), expected.weights)
    for folder in tmp_path.iterdir():
        found = world.folder / f"peft-{name}" / folder.name
        assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in folder.iterdir())
        for path in folder.iterdir():
            if path.suffix == ".json":
                assert settings(found / path.name) == settings(path)
            if path.suffix == ".safetensors":
                assert_close(load_file(found / path.name), load_file(path))


def test_ranks_drop_other_entries_and_the_same_ones_again(hf_world: Callable[..., Any]) -> None:
    """LoRA's dropout draws for a rank's tokens; a run is the same a second time, and where layers are recomputed."""
    first, second = hf_world(2, "living").results("peft-dropout")
    for result in (first, second):
        assert result["again"] == result["first"]
        assert result["recomputed"]["losses"] == pytest.approx(result["first"]["losses"], rel=1e-6)
        assert result["recomputed"]["kept"] == result["first"]["kept"]
    ours, theirs = (torch.tensor(result["first"]["kept"]).float() for result in (first, second))
    assert (ours - theirs).abs().mean() == pytest.approx(0.5, abs=0.15)
    for kept in (ours, theirs):
        assert kept.mean() == pytest.approx(0.5, abs=0.1)


def test_noise_on_embeddings_in_a_wrapper_has_the_scale_of_the_whole_sequence(hf_world: Callable[..., Any]) -> None:
    """NEFTune draws up to alpha / sqrt(L * D)."""
    for result in hf_world(2, "living").results("peft-noise"):
        bound = ALPHA / math.sqrt(LENGTH * result["width"])
        assert 0.95 * bound < result["largest"] <= bound * (1 + 1e-5)
