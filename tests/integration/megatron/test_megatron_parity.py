"""Real Megatron-core with each method trains as one process of stock Megatron does, beside its other parallelisms.

fp32, grouped-query attention, rotary embeddings, gradient clipping, tied embeddings, 4 microbatches; after 3 optimizer
steps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cores import EVERY, OLDEST
from megatron_runs import (
    CP2,
    CP4,
    PP2,
    TP2,
    VPP2,
    Run,
    assert_parity,
    assert_within_noise,
    model_arguments,
    train,
)

RING, LIGHTSEQ = "--sp-method ring", "--sp-method lightseq"

# Megatron-core, ranks, and arguments. The newest runs pairs of method and feature that
# test_megatron_matrix.py has not.
COMBINATIONS = {
    "cp2": (OLDEST, 2, CP2),
    "cp4, more ranks than key/value heads": (OLDEST, 4, "--context-parallel-size 4 --num-query-groups 2"),
    "cp2 x dp2": (OLDEST, 4, CP2),
    "cp2 x dp2, distributed optimizer": (OLDEST, 4, f"{CP2} --use-distributed-optimizer"),
    "tp2 x cp2": (OLDEST, 4, f"{TP2} {CP2}"),
    "tp2 x cp2, sequence parallel": (OLDEST, 4, f"{TP2} {CP2} --sequence-parallel"),
    "cp2 x pp2": (OLDEST, 4, f"{CP2} {PP2}"),
    "cp2 x pp2, interleaved": (OLDEST, 4, f"{CP2} {PP2} {VPP2}"),
    "tp2 x cp2 x pp2, sequence parallel, distributed optimizer": (
        EVERY,
        8,
        f"{TP2} {CP2} {PP2} --sequence-parallel --use-distributed-optimizer",
    ),
    "ring: cp4": (OLDEST, 4, f"{CP4} {RING}"),
    "ring: tp2 x cp2, sequence parallel, selective recompute": (
        OLDEST,
        4,
        f"{TP2} {CP2} --sequence-parallel --recompute-granularity selective {RING}",
    ),
    "ring: cp2 x pp2, interleaved, full recompute": (
        EVERY,
        4,
        f"{CP2} {PP2} {VPP2} --recompute-granularity full {RING}",
    ),
    "ring: cp2 x dp2, distributed optimizer, contiguous": (
        OLDEST,
        4,
        f"{CP2} --use-distributed-optimizer --sp-layout contiguous --sp-ring-gradient-dtype input {RING}",
    ),
    "usp: cp4": (OLDEST, 4, f"{CP4} --sp-method usp --sp-ulysses-size 2 --sp-ring-size 2"),
    "usp: cp4, strided, contiguous, sliding window": (
        EVERY,
        4,
        f"{CP4} --sp-method usp --sp-ulysses-size 2 --sp-ulysses-order strided --sp-layout contiguous "
        "--window-size 16 0",
    ),
    "lightseq: cp4": (OLDEST, 4, f"{CP4} {LIGHTSEQ}"),
    "lightseq: tp2 x cp2, full recompute that keeps attention": (
        OLDEST,
        4,
        f"{TP2} {CP2} --recompute-granularity full --sp-recompute keep_attention {LIGHTSEQ}",
    ),
    "lightseq: cp2 x pp2, interleaved, uneven loss mask, per-token loss": (
        EVERY,
        4,
        f"{CP2} {PP2} {VPP2} --mask-newlines --calculate-per-token-loss {LIGHTSEQ}",
    ),
    "lightseq: cp2 x dp2, distributed optimizer, selective recompute": (
        OLDEST,
        4,
        f"{CP2} --use-distributed-optimizer --recompute-granularity selective {LIGHTSEQ}",
    ),
    "cp2, uneven loss mask, per-token loss": (OLDEST, 2, f"{CP2} --mask-newlines --calculate-per-token-loss"),
    "cp2, sliding window": (OLDEST, 2, f"{CP2} --window-size 16 0"),
    "cp2, selective recompute, untied embeddings": (
        OLDEST,
        2,
        f"{CP2} --recompute-granularity selective --untie-embeddings-and-output-weights",
    ),
}


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [pytest.param(*case, id=name, marks=core) for name, (core, *case) in COMBINATIONS.items()],
)
def test_trains_like_one_process_of_stock_megatron(
    ranks: int, arguments: str, reference: Callable[..., Run], tmp_path: Path
) -> None:
    argv = arguments.split()
    assert_parity(train(tmp_path, ranks, *argv), reference(*model_arguments(argv)))


@pytest.mark.timeout(400)
def test_dropout_does_not_depend_on_the_sharding(reference: Callable[..., Run], tmp_path: Path) -> None:
    dropped = ("--attention-dropout", "0.3")
    two = train(tmp_path / "two", 2, "--context-parallel-size", "2", *dropped)
    four = train(tmp_path / "four", 4, "--context-parallel-size", "4", *dropped, "--recompute-granularity", "selective")
    assert_parity(four, two)
    assert abs(two.losses[0] - reference().losses[0]) > 1e-4, "nothing was dropped"


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("method", "ranks", "arguments"),
    [
        ("ring", 2, "--calculate-per-token-loss --mask-newlines"),
        ("lightseq", 2, "--mask-newlines"),
        pytest.param("ulysses", 4, "", marks=pytest.mark.matrix),
        pytest.param("lightseq", 4, "--calculate-per-token-loss --mask-newlines", marks=pytest.mark.matrix),
    ],
)
def test_multi_token_prediction_counts_the_tokens_of_all_ranks(
    method: str, ranks: int, arguments: str, reference: Callable[..., Run], tmp_path: Path
) -> None:
    argv = ("--mtp-num-layers", "2", *arguments.split())
    run = train(tmp_path, ranks, "--context-parallel-size", str(ranks), "--sp-method", method, *argv)
    assert_parity(run, reference(*argv))


@pytest.mark.timeout(400)
@OLDEST
@pytest.mark.parametrize("method", ["ulysses", "ring", "lightseq"])
def test_bf16_stays_within_its_own_noise(method: str, reference: Callable[..., Run], tmp_path: Path) -> None:
    exact, rounded = reference(), reference("--bf16")
    run = train(tmp_path, 4, "--context-parallel-size", "4", "--sp-method", method, "--bf16")
    assert_within_noise(run, rounded, exact, most=0.01)
