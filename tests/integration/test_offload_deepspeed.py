"""``"memory": {"offload": true}`` in real DeepSpeed: steps are the same to the bit, whoever checkpoints the layers."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from deferred_copies import copies_of, settings_defer
from test_recompute_deepspeed import BATCH, WORLD, CausalLM, batch, checkpoint_function, optimizer
from torch import Tensor

from dsp_plugin import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.spawn import spawn

pytestmark = [
    pytest.mark.deepspeed,
    pytest.mark.timeout(240),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

ROUNDS, GAS = 2, 2


@dataclass(frozen=True)
class Case:
    """A run of `ROUNDS` optimizer steps of `GAS` batches each.

    Attributes:
        way: who checkpoints the layers, see `checkpoint_function`.
        stage: of ZeRO.
    """

    way: str
    stage: int
    recompute: str = "full"
    method: str = "ulysses"


COVERING = [Case("torch, non-reentrant", 3, "keep_attention"), Case("deepspeed", 2)]
MATRIX = [
    Case(way, stage, recompute, method)
    for way in ("torch, non-reentrant", "torch, reentrant", "deepspeed", "deepspeed, non-reentrant")
    for stage, recompute, method in ((3, "full", "ring"), (2, "keep_attention", "ulysses"), (0, "full", "lightseq"))
    # DeepSpeed's own fails under ZeRO 3 without us, too: it unpacks weights that were gathered for the first run.
    if (way, stage) != ("deepspeed, non-reentrant", 3)
]


def train(case: Case, memory: Any, partition: bool = False) -> dict[str, Any]:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": GAS,
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1000,
        "sequence_parallel": {
            "method": case.method,
            "size": WORLD,
            "recompute": case.recompute,
            "attention": ["layers.*.attn"],
            "batch": {"input_ids": 1, "position_ids": 1, "labels": 1},
            "loss": {"labels": "labels"},
            "quiet": True,
            **({} if memory is None else {"memory": memory}),
        },
    }
    torch.manual_seed(0)
    model = CausalLM(checkpoint_function(case.way, deepspeed))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)
    deepspeed.checkpointing.configure(None, partition_activations=partition, checkpoint_in_cpu=False)
    losses: list[float] = []
    try:
        for step in range(ROUNDS * GAS):
            loss = engine(**batch(step))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        with torch.no_grad():
            losses.append(engine(**batch(step)).item())
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=case.stage == 3):
            weights: list[Tensor] = [parameter.detach().clone() for parameter in engine.module.parameters()]
    finally:
        engine.destroy()
    return {"losses": losses, "weights": weights}


def run(cases: list[Case]) -> list[dict[str, Any]]:
    """Each case without and with an offload: what is the same of it on this rank, and what the offload did."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(WORLD))
    import deepspeed

    deepspeed.init_distributed()
    found = []
    for case in cases:
        without = train(case, None)
        with settings_defer() as made:
            offloaded = train(case, {"offload": True})
        (offload,) = made
        counts = offload.counts()
        found.append(
            {
                "faults": copies_of(offload).faults,
                "checkpoints": counts.stretches,
                "left": (counts.host, counts.device),
                # As many in all steps as in the first.
                "buffers reused": counts.moved >= ROUNDS * GAS * counts.host_held > 0,
                "losses": offloaded["losses"] == without["losses"],
                "weights": all(map(torch.equal, offloaded["weights"], without["weights"])),
            }
        )
    return found


SAME = {
    "faults": [],
    "checkpoints": 2 * ROUNDS * GAS,
    "left": (0, 0),
    "buffers reused": True,
    "losses": True,
    "weights": True,
}


@pytest.mark.parametrize(
    "cases",
    [
        COVERING,
        *(
            pytest.param([case for case in MATRIX if case.stage == stage], marks=pytest.mark.matrix)
            for stage in (3, 2, 0)
        ),
    ],
    ids=["covering", "ZeRO 3", "ZeRO 2", "ZeRO 0"],
)
def test_a_step_is_the_same_to_the_bit(cases: list[Case]) -> None:
    for rank in spawn(run, WORLD, cases, timeout=220):
        assert dict(zip(cases, rank, strict=True)) == dict.fromkeys(cases, SAME)


REFUSED: dict[str, tuple[Case, Any, bool, type[Exception], str]] = {
    "no checkpoints": (Case("none", 2), {"offload": True}, False, UnsupportedError, "made no checkpoint"),
    "less than a layer": (
        Case("torch, non-reentrant", 2),
        {"offload": "100B"},
        False,
        SequenceParallelConfigError,
        "memory.offload='100 bytes'.*not one of them fits",
    ),
    "more than there is": (
        Case("torch, non-reentrant", 2),
        {"offload": "900TiB"},
        False,
        SequenceParallelConfigError,
        "bytes of host memory, and .* are free",
    ),
    "DeepSpeed's own": (Case("deepspeed", 2), {"offload": True}, True, UnsupportedError, "partition_activations"),
}


def refused() -> dict[str, str]:
    """What every refusal says, and that the ranks go on together after it."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_SIZE=str(WORLD))
    import deepspeed

    deepspeed.init_distributed()
    found = {}
    for name, (case, memory, partition, kind, _) in REFUSED.items():
        try:
            train(case, memory, partition)
        except kind as error:
            found[name] = str(error)
    return found


def test_what_cannot_be_is_refused_on_every_rank_in_words() -> None:

    for rank in spawn(refused, WORLD, timeout=200):
        for name, (*_, words) in REFUSED.items():
            assert re.search(words, rank.get(name, "")), (name, rank.get(name))
