"""Transformers' models under DeepSpeed, told a method and a size, train as they do alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import pytest
import torch
from hf_cases import Case, Trained, cases, train_alone

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5
ALL = [case for world in (2, 3, 4) for case in cases(world)]
# Three ranks in the covering subset: test_hf_rows.
BEYOND = 3


def chosen(found: list[Case]) -> list[Any]:
    """As parameters; those of one world run with ``--matrix``."""
    return [
        pytest.param(case, id=case.name, marks=[pytest.mark.matrix] if case.world == BEYOND else []) for case in found
    ]


@cache
def alone(family: str, batch: str, replicas: int, dtype: str = "fp32") -> Trained:
    """The unsharded run, which neither ZeRO nor checkpointing changes."""
    return train_alone(family, batch, replicas, dtype)


@pytest.mark.parametrize("case", chosen([case for case in ALL if case.dtype == "fp32"]))
def test_training_equals_the_unsharded_run(case: Case, hf_world: Callable[[int], Any]) -> None:
    """Losses of every step, and every gradient of the first."""
    expected = alone(case.family, case.batch, case.replicas, case.reference)
    results = hf_world(case.world).results(case.name)
    for result in results:
        assert result["losses"] == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
        # A ring sends nothing where all documents are short enough to lie whole on a rank.
        whole = case.method == "ring" and case.batch.startswith("packed")
        assert result["sent"] > 0 or whole, "the sequence was not sharded"

    gradients = hf_world(case.world).gradients(case.name)
    assert gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        found = gradients[name]
        assert found is not None, name
        error = (found - gradient).abs().max() / gradient.abs().max()
        assert error < GRADIENT_TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize("world", [pytest.param(BEYOND, marks=pytest.mark.matrix), 4])
def test_the_first_rank_names_the_model_once(world: int, hf_world: Callable[[int], Any]) -> None:
    """One line for each configuration and model, and none on other ranks, where nothing but these cases runs."""
    first, *others = ((hf_world(world).folder / f"rank{rank}.log").read_text() for rank in range(world))
    lines = re.findall(r"^dsp_plugin .*", first, re.M)
    assert lines
    assert len(set(lines)) == len(lines)
    patched = rf"patched deepspeed \S+ \(\d+ patches\).*, one \w+ForCausalLM of transformers {version('transformers')}"
    traded = r"( \| memory tile_tokens \d)?"
    pattern = rf"\w+ over \d ranks \(.*\) \| tokens \w+ \| kernel cpu_flash \| recompute \w+{traded} \| {patched}"
    assert all(re.fullmatch(pattern, line.split(" | ", 1)[1]) for line in lines), lines
    assert not any(re.search(r"^dsp_plugin .*", text, re.M) for text in others)


@pytest.mark.parametrize("case", chosen(ALL))
def test_sequence_peers_see_one_loss(case: Case, hf_world: Callable[[int], Any]) -> None:
    """A script that logs its loss logs the same on all peers, and it is that of the whole sequence."""
    local = [result["local"] for result in hf_world(case.world).results(case.name)]
    for first in range(0, case.world, case.size):
        assert all(losses == local[first] for losses in local[first : first + case.size])


@pytest.mark.parametrize("case", chosen([case for case in ALL if case.dtype == "bf16"]))
def test_bf16_stays_within_the_noise_of_bf16(case: Case, hf_world: Callable[[int], Any]) -> None:
    """Sharding moves gradients no farther than bf16 itself moves them from fp32."""
    exact = alone(case.family, case.batch, case.replicas)
    unsharded = alone(case.family, case.batch, case.replicas, "bf16")
    assert hf_world(case.world).results(case.name)[0]["losses"] == pytest.approx(exact.losses, rel=1e-2)
    gradients = hf_world(case.world).gradients(case.name)
    for name, gradient in exact.gradients.items():
        assert _error(gradients[name], gradient) < max(3 * _error(unsharded.gradients[name], gradient), 2e-2), name


def _error(found: torch.Tensor | None, exact: torch.Tensor) -> float:
    assert found is not None
    return ((found - exact).norm() / exact.norm()).item()
