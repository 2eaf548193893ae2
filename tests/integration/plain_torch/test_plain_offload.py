"""Checkpoints in host memory in plain PyTorch scripts: training is the same to the bit, by batch, plan and model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from deferred_copies import copies_of, settings_defer
from torch_training import Case, train

from dsp_plugin import UnsupportedError
from dsp_plugin.spawn import spawn

pytestmark = pytest.mark.timeout(280)

COVERING = [Case("llama", "ulysses", 2, "fsdp", checkpointed=True), Case("plan", "dsp", 2, "ddp", checkpointed=True)]
MATRIX = [
    Case(kind, method, 2, wrap, accumulate, checkpointed=True)
    for kind, method in (("batch", "ring"), ("llama", "ring"), ("plan", "dsp"))
    for wrap, accumulate in (("ddp first", 2), ("fsdp first", 1))
]
SAME = {"losses": True, "norms": True, "weights": True, "moved": True, "faults": [], "left": (0, 0)}


def run(cases: list[Case]) -> list[dict[str, Any]]:
    """Each case without and with an offload: what is the same of it on this rank, and what the offload did."""
    found = []
    for case in cases:
        without = train(case)
        with settings_defer() as made:
            offloaded = train(replace(case, offload=True))
        (offload,) = made
        counts = offload.counts()
        found.append(
            {
                "losses": offloaded.losses == without.losses,
                "norms": offloaded.norms == without.norms,
                "weights": all(torch.equal(offloaded.weights[name], x) for name, x in without.weights.items()),
                "moved": counts.moved > 0,
                "faults": copies_of(offload).faults,
                "left": (counts.host, counts.device),
            }
        )
    return found


@pytest.mark.parametrize("cases", [COVERING, pytest.param(MATRIX, marks=pytest.mark.matrix)], ids=["some", "matrix"])
def test_training_is_the_same_to_the_bit(cases: list[Case]) -> None:
    for rank in spawn(run, 2, cases, timeout=260):
        assert dict(zip(map(str, cases), rank, strict=True)) == dict.fromkeys(map(str, cases), SAME)


def unused() -> str:
    try:
        train(Case("llama", "ulysses", 2, "ddp", offload=True))
    except UnsupportedError as error:
        return str(error)
    return "nothing"


def test_a_model_that_makes_no_checkpoints_is_refused_on_every_rank() -> None:
    for words in spawn(unused, 2, timeout=120):
        assert "made no checkpoint" in words
