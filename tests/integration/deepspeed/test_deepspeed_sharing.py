"""What sequence peers share, and what batch sizes count, in 4 ranks with sequence groups (0, 1) and (2, 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from deepspeed_cases import Case
from deepspeed_sharing import ROUTES, SAMPLES
from test_deepspeed_parity import LOSS_TOLERANCE, reference

Results = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(name="results")
def _results(world: Callable[[int], Any]) -> Results:
    return lambda case: world(4).results(case)


def assert_equal_on_peers(results: list[dict[str, Any]]) -> None:
    """Ranks of one sequence group have the same result."""
    assert results[0] == results[1]
    assert results[2] == results[3]


@pytest.mark.parametrize(
    ("given", "train", "micro", "accumulation"),
    [
        ("train_and_micro", 8, 2, 2),
        ("train_and_accumulation", 8, 2, 2),
        ("micro_and_accumulation", 8, 2, 2),
        ("all_three", 8, 2, 2),
        ("train_only", 6, 3, 1),
        ("micro_only", 6, 3, 1),
    ],
)
def test_batch_sizes_count_samples(results: Results, given: str, train: int, micro: int, accumulation: int) -> None:
    """DeepSpeed's two-of-three rule holds with 2 replicas; throughput and sample counters count the same samples."""
    for result in results(f"sizes_{given}"):
        assert result == {"info": [train, micro, accumulation], "timer": train, "samples": train, "steps": 1}


def test_batch_sizes_set_later_count_samples(results: Results) -> None:
    """`set_train_batch_size` and `set_train_micro_batch_size`: accumulation = 12 / (2 * 2), then train = 5 * 3 * 2."""
    for result in results("changed_sizes"):
        assert (result["train"], result["micro"]) == ([12, 2, 3], [30, 5, 3])
        assert result["refused"]


@pytest.mark.parametrize("name", ROUTES)
def test_section_is_found_by_every_route(results: Results, name: str) -> None:
    """However the config is given, and also by an `initialize` that the script imported before us."""
    for rank, result in enumerate(results(f"route_{name}")):
        assert result == {
            "size": 2,
            "sp": [0, 1] if rank < 2 else [2, 3],
            "dp": [rank % 2, rank % 2 + 2],
            "train": 4,
            "config_kept": True,
        }


def test_training_data_is_the_same_on_peers_and_split_over_replicas(results: Results) -> None:
    """In both of DeepSpeed's loaders every sample goes to both ranks of one group; one of 11 is repeated to fill up."""
    found = results("training_data")
    assert_equal_on_peers(found)
    for route in ("train", "eval"):
        seen = [sample for result in (found[0], found[2]) for batch in result[route] for sample in batch]
        assert set(seen) == set(range(SAMPLES))
        assert len(seen) == SAMPLES + 1
    assert [result["batches"] for result in found] == [3] * 4
    assert [result["world_kept"] for result in found] == [4] * 4


def test_loader_of_plain_data_parallelism_is_refused(results: Results) -> None:
    """The message names the ranks, the input and the way out, on every rank."""
    for rank, result in enumerate(results("wrong_loader")):
        ranks = [0, 1] if rank < 2 else [2, 3]
        for fragment in (
            f"ranks {ranks} share one sequence",
            f"rank {ranks[0]} has 'input_ids' [2, 13] int64",
            f"rank {ranks[1]} has 'input_ids'",
            "training_data",
            "SequenceParallelBatchSampler",
            "groups=engine.sequence_parallel_groups",
        ):
            assert fragment in result["refused"]
        assert "'position_ids'" not in result["refused"], "equal inputs are not blamed"


def test_loader_over_replicas_is_accepted(results: Results) -> None:
    """A script's own loader over the replica axis works."""
    found = results("right_loader")
    assert_equal_on_peers(found)
    assert found[0]["losses"] != found[2]["losses"]


def test_sampler_serves_a_loader_of_the_script_and_goes_on_from_the_engines_count(results: Results) -> None:
    """Peers are given the same samples and replicas others, in whole optimizer steps that cover the epoch."""
    found = results("sampler_loader")
    assert_equal_on_peers(found)
    seen = [sample for result in (found[0], found[2]) for batch in result["whole"] for sample in batch]
    assert set(seen) == set(range(SAMPLES))
    assert len(seen) == SAMPLES + 1
    assert found[0]["losses"] != found[2]["losses"]
    for result in found:
        assert result["trained"] == 8
        assert result["resumed"] == result["whole"][2:]


def test_monitors_count_samples(results: Results) -> None:
    """The x-axis of DeepSpeed's monitors: 8 samples per step, not 16."""
    lines = results("monitor")[0]["csv"].split()
    assert [line.split(",")[0] for line in lines] == ["step", "8", "16"]


def test_model_built_partitioned(results: Results) -> None:
    """`zero.Init` reads the config by itself, and must not find its batch sizes wrong."""
    expected = reference(Case("lm", "ulysses", 2, 2, 3)).losses[0]
    found = results("zero_init")
    assert found[0]["loss"] == pytest.approx(expected, rel=LOSS_TOLERANCE)
    assert [result["train"] for result in found] == [4] * 4


def test_without_the_section_nothing_changes(results: Results) -> None:
    """Batch sizes count ranks, ranks get different samples, and no module is hooked."""
    found = results("without_section")
    for result in found:
        assert not result["groups"]
        assert (result["train"], result["forwards"]) == (8, 0)
    samples = [sample for result in found for batch in result["samples"] for sample in batch]
    assert len(samples) == SAMPLES + 1
    assert set(samples) == set(range(SAMPLES))


def test_random_numbers_are_equal_on_peers(results: Results) -> None:
    """Scripts that seed by rank: peers draw the same noise and drop the same activations; replicas and steps do not.

    Peers hold 7 and 6 tokens, so dropout draws unequal amounts; the draw after training still agrees.
    """
    found = results("random_state")
    assert_equal_on_peers(found)
    assert found[0]["drawn"] != found[2]["drawn"]
    assert len({*found[0]["losses"], *found[2]["losses"]}) == 6


def test_buffers_are_equal_on_peers(results: Results) -> None:
    """DeepSpeed shares parameters only."""
    assert_equal_on_peers(results("buffers"))


def test_bf16_gradients_are_averaged_in_fp32_unless_told_otherwise(results: Results) -> None:
    """`communication_data_type` of the user wins."""
    for result in results("communication"):
        assert result == {"default": "torch.float32", "chosen": "torch.bfloat16"}
