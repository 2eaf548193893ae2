"""Real Megatron-core with Ulysses trains as one process of stock Megatron does, beside each of its other parallelisms.

fp32, grouped-query attention, rotary embeddings, gradient clipping, tied embeddings, 4 microbatches; after 3 optimizer
steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from megatron_runs import Run, assert_parity, train

TP2, PP2, CP2 = (f"--{axis}-parallel-size 2" for axis in ("tensor-model", "pipeline-model", "context"))
VPP2 = "--virtual-pipeline-model-parallel-size 2"

COMBINATIONS = {
    "cp2": (2, CP2),
    "cp4, more ranks than key/value heads": (4, "--context-parallel-size 4 --num-query-groups 2"),
    "cp2 x dp2": (4, CP2),
    "cp2 x dp2, distributed optimizer": (4, f"{CP2} --use-distributed-optimizer"),
    "tp2 x cp2": (4, f"{TP2} {CP2}"),
    "tp2 x cp2, sequence parallel": (4, f"{TP2} {CP2} --sequence-parallel"),
    "cp2 x pp2": (4, f"{CP2} {PP2}"),
    "cp2 x pp2, interleaved": (4, f"{CP2} {PP2} {VPP2}"),
    "tp2 x cp2 x pp2, sequence parallel, distributed optimizer": (
        8,
        f"{TP2} {CP2} {PP2} --sequence-parallel --use-distributed-optimizer",
    ),
    "cp2, ring": (2, f"{CP2} --sp-method ring"),
    "cp4, usp": (4, "--context-parallel-size 4 --sp-method usp --sp-ulysses-size 2 --sp-ring-size 2"),
    "cp2, uneven loss mask, per-token loss": (2, f"{CP2} --mask-newlines --calculate-per-token-loss"),
    "cp2, sliding window": (2, f"{CP2} --window-size 16 0"),
    "cp2, recomputed attention, untied embeddings": (
        2,
        f"{CP2} --recompute-core-attention --untie-embeddings-and-output-weights",
    ),
}
MODEL_FLAGS = {
    "--num-query-groups": 1,
    "--mask-newlines": 0,
    "--calculate-per-token-loss": 0,
    "--window-size": 2,
    "--untie-embeddings-and-output-weights": 0,
}


def model_arguments(argv: list[str]) -> list[str]:
    """The part of a command line that changes the model or the loss, and not how it is sharded."""
    kept: list[str] = []
    for place, argument in enumerate(argv):
        if argument in MODEL_FLAGS:
            kept += argv[place : place + 1 + MODEL_FLAGS[argument]]
    return kept


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("ranks", "arguments"), COMBINATIONS.values(), ids=COMBINATIONS)
def test_trains_like_one_process_of_stock_megatron(
    ranks: int, arguments: str, reference: Callable[..., Run], tmp_path: Path
) -> None:
    argv = arguments.split()
    assert_parity(train(tmp_path, ranks, *argv), reference(*model_arguments(argv)))


@pytest.mark.timeout(400)
def test_dropout_does_not_depend_on_the_sharding(reference: Callable[..., Run], tmp_path: Path) -> None:
    dropped = ("--attention-dropout", "0.3")
    two = train(tmp_path / "two", 2, "--context-parallel-size", "2", *dropped)
    four = train(tmp_path / "four", 4, "--context-parallel-size", "4", *dropped, "--recompute-core-attention")
    assert_parity(four, two)
    assert abs(two.losses[0] - reference().losses[0]) > 1e-4, "nothing was dropped"
