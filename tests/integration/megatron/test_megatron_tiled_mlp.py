"""Megatron's MLP from tiles: the same numbers and the same collectives, with less of it alive at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiled_mlp_workers as workers
from cores import OLDEST
from megatron_runs import CP2, PP2, TP2, Run, assert_parity, model_arguments, train

from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.timeout(400), OLDEST]
EVERYTHING = ("--sp-memory", '{"tile_tokens": 13, "mlp_tiles": 3}')


@pytest.fixture(
    scope="module", params=[True, pytest.param(False, marks=pytest.mark.matrix)], ids=["sequence parallel", "tp"]
)
def seen(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each of two tensor-parallel ranks saw."""
    return spawn(workers.beside_whole, 2, request.param, timeout=200)


def test_fp64_is_exact(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        for kind in workers.KINDS:
            assert rank[kind]["error"] < 1e-12, kind


def test_no_tensor_has_all_tokens_between_the_layers(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        for kind in workers.KINDS:
            tiled, whole = rank[kind]["largest"]
            assert tiled < rank["between"] <= whole, kind


def test_ranks_send_what_they_send_without_tiles(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        for kind in workers.KINDS:
            assert rank[kind]["sends"] > 0
            assert rank[kind]["sends the same"], kind


@pytest.mark.matrix
def test_layers_that_are_not_known_are_refused_and_experts_left_alone() -> None:
    for found in spawn(workers.refused, 2, timeout=200):
        assert "linear_fc1 is a TELayerNormColumnParallelLinear" in found["layer"]
        assert "MLP is a Own" in found["class"]
        assert "--transformer-impl local" in found["class"]
        assert found["auto"] == ""
        assert int(found["expert's largest"]) >= workers.LENGTH * workers.BATCH * workers.FFN // 2


COMBINATIONS = {
    "tp2 x cp2, sequence parallel, full recompute": (
        4,
        f"{TP2} {CP2} --sequence-parallel --recompute-granularity full",
    ),
    "cp2, full recompute": (2, f"{CP2} --recompute-granularity full"),
    "cp2, full recompute that keeps attention": (
        2,
        f"{CP2} --recompute-granularity full --sp-recompute keep_attention",
    ),
    "tp2, sequence parallel, selective recompute": (
        2,
        f"{TP2} --sequence-parallel --recompute-granularity selective",
    ),
    "cp2 x pp2, distributed optimizer": (4, f"{CP2} {PP2} --use-distributed-optimizer"),
    "tp2 x pp2": (4, f"{TP2} {PP2}"),
    "mtp": (1, "--mtp-num-layers 2"),
}


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [pytest.param(*case, id=name) for name, case in COMBINATIONS.items()],
)
def test_trains_with_head_and_mlp_in_tiles_like_one_process_of_stock_megatron(
    ranks: int, arguments: str, reference: Callable[..., Run], tmp_path: Path
) -> None:
    argv = arguments.split()
    assert_parity(train(tmp_path, ranks, *argv, *EVERYTHING), reference(*model_arguments(argv)))


@pytest.mark.matrix
@pytest.mark.parametrize(
    "memory", ["auto", '{"tile_tokens": 13, "mlp_tiles": 3, "offload": true, "attention_rounds": 2}']
)
def test_a_step_with_every_part_on_is_the_step_with_none(
    memory: str, reference: Callable[..., Run], tmp_path: Path
) -> None:
    argv = [*TP2.split(), *CP2.split(), "--sequence-parallel", "--recompute-granularity", "full"]
    assert_parity(train(tmp_path, 4, *argv, "--sp-memory", memory), reference())
