"""Megatron's head and loss from tiles: as exact as from whole logits, and no rank has the logits of all its tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiled_head_workers as workers
from cores import EVERY, needs
from megatron_runs import CP2, CP4, PP2, TP2, VPP2, Run, assert_parity, assert_within_noise, model_arguments, train

from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.timeout(400), EVERY]
# MLPs come in tiles, too, which test_megatron_tiled_mlp.py has the rest of.
TILES = ("--sp-memory", '{"tile_tokens": 13, "mlp_tiles": 3}')
MODELS = Path(__file__).with_name("other_models.py")
# What a rank sends of a token: its statistics of the logits, in fp64 as everything in that step; or what it predicts.
STATISTICS, PREDICTION = 24, 12
MULTI_TOKEN = "--mtp-num-layers 2"
PER_TOKEN = "--calculate-per-token-loss"
UNTIED = "--untie-embeddings-and-output-weights"
needs_hybrids = needs("megatron.core.models.hybrid", "this megatron-core has no HybridModel")


@pytest.fixture(scope="module")
def seen() -> list[dict[str, Any]]:
    """What each of two tensor-parallel ranks saw."""
    return spawn(workers.short_world, 2, timeout=200)


def test_no_tensor_is_as_large_as_the_logits_of_all_tokens(seen: list[dict[str, Any]]) -> None:
    for sizes in (rank["sizes"] for rank in seen):
        assert sizes["tiled"] <= sizes["weight"] < sizes["logits"]
        assert sizes["whole"] >= sizes["logits"], "or the test would not see them"


def test_a_collective_of_statistics_a_tile_is_all_that_is_sent(seen: list[dict[str, Any]]) -> None:
    heads, tokens = 1 + workers.MTP, workers.BATCH * workers.LENGTH
    tiles = -(-tokens // workers.TILE)
    for sizes in (rank["sizes"] for rank in seen):
        assert not sizes["whole, sent"]
        ((*kind, total, calls),) = sizes["tiled, sent"]
        assert kind == ["head", "all_gather", "tp", "forward"]
        predicted = sizes["predicts"] * workers.MTP
        assert total == heads * tokens * STATISTICS + predicted * tokens * PREDICTION
        assert calls == heads * tiles + 2 * predicted


def test_fp64_is_exact(seen: list[dict[str, Any]]) -> None:
    for name, error in ((name, error) for rank in seen for name, error in rank["errors"].items()):
        assert error < 1e-10, name


def test_predictions_are_those_of_whole_logits(seen: list[dict[str, Any]]) -> None:
    assert all(rank["predictions"] for rank in seen)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("loss", ["model='OwnLoss'", "compute_language_model_loss", "leave tile_tokens out"]),
        ("kind", ["model='Sibling'", "GPTModel and "]),
        ("gathered", ["parallel_output=False", "parallel_output=True"]),
        ("gathered when called", ["runtime_gather_output=True"]),
        ("deferred gradient", ["--defer-embedding-wgrad-compute=True", "microbatches"]),
        ("processor", ["output_processor="]),
        ("layer", ["output layer='OwnHead'", "ColumnParallelLinear"]),
        ("a soft cap", ["passed to tanh", "scaling by numbers"]),
        ("a cast", ["asked for .float"]),
        ("a sum", ["passed to "]),
        ("a tensor's product", ["multiplied or divided by a Tensor"]),
    ],
)
def test_what_is_not_known_is_refused_on_every_rank(case: str, words: list[str], seen: list[dict[str, Any]]) -> None:
    messages = {rank["refused"].get(case) for rank in seen}
    if messages == {None}:
        pytest.skip("this megatron-core has no such argument")
    (message,) = messages
    assert message is not None
    assert message.startswith("UnsupportedError: ")
    assert all(word.lower() in message.lower() for word in words), message


def test_a_refusal_leaves_the_model_usable(seen: list[dict[str, Any]]) -> None:
    for refused in (rank["refused"] for rank in seen):
        assert (refused["still works"], refused["forward left"], refused["scaled"]) == ("", "False", "0.75")


COMBINATIONS = {
    "cp1": (1, "--context-parallel-size 1"),
    "cp2": (2, CP2),
    "cp4, lightseq": (4, f"{CP4} --sp-method lightseq"),
    "cp2, untied, uneven loss mask": (2, f"{CP2} {UNTIED} --mask-newlines"),
    "cp2 x dp2, distributed optimizer, per-token loss": (
        4,
        f"{CP2} --use-distributed-optimizer --mask-newlines {PER_TOKEN}",
    ),
    "tp2": (2, TP2),
    "tp2, untied": (2, f"{TP2} {UNTIED}"),
    "tp2, sequence parallel": (2, f"{TP2} --sequence-parallel"),
    "tp2 x cp2, sequence parallel, full recompute": (
        4,
        f"{TP2} {CP2} --sequence-parallel --recompute-granularity full",
    ),
    "tp2 x pp2, sequence parallel": (4, f"{TP2} {PP2} --sequence-parallel"),
    "pp2, untied": (2, f"{PP2} {UNTIED}"),
    "cp2 x pp2, interleaved": (4, f"{CP2} {PP2} {VPP2}"),
    "mtp": (1, MULTI_TOKEN),
    "mtp, tp2, sequence parallel, per-token loss, uneven loss mask": (
        2,
        f"{TP2} --sequence-parallel --mask-newlines {PER_TOKEN} {MULTI_TOKEN}",
    ),
    "mtp, pp2": (2, f"{PP2} {MULTI_TOKEN}"),
    "mtp, pp2, untied": (2, f"{PP2} {UNTIED} {MULTI_TOKEN}"),
}


@pytest.mark.parametrize(
    ("ranks", "arguments"),
    [
        # In CI.
        pytest.param(
            4,
            f"{TP2} {PP2} --sequence-parallel --use-distributed-optimizer {UNTIED} {MULTI_TOKEN}",
            id="mtp, tp2 x pp2, sequence parallel, distributed optimizer",
        ),
        *(pytest.param(*case, id=name, marks=pytest.mark.matrix) for name, case in COMBINATIONS.items()),
    ],
)
def test_trains_like_one_process_of_stock_megatron(
    ranks: int, arguments: str, reference: Callable[..., Run], tmp_path: Path
) -> None:
    argv = arguments.split()
    assert_parity(train(tmp_path, ranks, *argv, *TILES), reference(*model_arguments(argv)))


@pytest.mark.matrix
@pytest.mark.parametrize("memory", ["auto", '{"tile_tokens": 1}', '{"tile_tokens": 100000}'])
def test_any_tile(memory: str, reference: Callable[..., Run], tmp_path: Path) -> None:
    argv = [*CP2.split(), "--micro-batch-size", "2"]
    assert_parity(train(tmp_path, 2, *argv, "--sp-memory", memory), reference())


@pytest.mark.matrix
def test_multi_token_prediction_of_a_sharded_sequence(reference: Callable[..., Run], tmp_path: Path) -> None:
    argv = [*MULTI_TOKEN.split(), PER_TOKEN]
    assert_parity(train(tmp_path, 2, *CP2.split(), *argv, *TILES), reference(*argv))


@pytest.mark.matrix
def test_bf16_stays_within_its_own_noise(reference: Callable[..., Run], tmp_path: Path) -> None:
    run = train(tmp_path, 2, *TP2.split(), "--bf16", *TILES)
    assert_within_noise(run, reference("--bf16"), reference(), most=0.01)


@needs_hybrids
@pytest.mark.matrix
@pytest.mark.parametrize("arguments", [CP2, f"{TP2} --sequence-parallel", PP2])
def test_hybrid_models(arguments: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", 1, "hybrid", plugin=False, script=MODELS)
    assert_parity(train(tmp_path / "tiled", 2, "hybrid", *arguments.split(), *TILES, script=MODELS), whole)


@pytest.mark.matrix
def test_hybrids_of_any_core() -> None:
    for error in spawn(workers.hybrid_error, 2, timeout=200):
        assert error < 1e-10


@pytest.mark.matrix
def test_attention_sends_what_it_sent_before() -> None:
    for sent in spawn(workers.traffic_of_a_sharded_sequence, 4, timeout=200):
        others = [row for row in sent["tiled"] if row[0] != "head"]
        assert others == sent["whole"]
        assert others
        assert len(sent["tiled"]) == len(others) + 1


@pytest.mark.matrix
def test_fp64_is_exact_without_sequence_parallel_activations() -> None:
    for found in spawn(workers.errors, 2, False, timeout=200):
        assert max(found.values()) < 1e-10, found


@pytest.mark.matrix
def test_beside_fused_weight_gradients_each_comes_out_once() -> None:
    for found in spawn(workers.fused_gradients, 2, timeout=200):
        assert max(found.values()) < 1e-5, found
