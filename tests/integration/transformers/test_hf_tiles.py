"""Models of Transformers whose head and loss are tiled: exact, of every family, without logits of all tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import families
import pytest
import torch
from families import RESULTS, read
from hf_models import LENGTH, build_model, micro_batch
from hf_tiles import CLASSES, LONG, TILE
from preloading import preload

from dsp_plugin import Layout, SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.patches.transformers import trials
from dsp_plugin.spawn import spawn
from dsp_plugin.verification.model import Verdict, compare

SETTINGS = {"memory": {"tile_tokens": 5}}
# They differ in what is between the head and its loss: a soft cap; factors and divisors; dtypes and views; a bias that
# is tied; heads within heads; experts.
COVERED = ("gemma3n_text", "cohere", "granite", "hyperclovax", "mllama", "opt", "bert", "modernbert-decoder", "mixtral")
FEATURES = ("tokens", "packed", "padded")


def exact_families() -> list[str]:
    """That are exact without tiles, in the installed version or in any."""
    return sorted(
        {
            name
            for run in read(list(RESULTS.glob("*.json")))
            for name, e in run["families"].items()
            if e["status"] == "exact"
        }
    )


def _told(verdicts: dict[str, Verdict]) -> dict[str, str]:
    return {name: f"{v.status} {v.why} {v.first}" for name, v in verdicts.items()}


def test_what_families_do_to_logits_is_part_of_a_tile() -> None:
    """Losses of three steps and every gradient, in fp64."""
    preload("transformers.modeling_utils", "families")
    found = families.run({family: ["tokens"] for family in COVERED}, timeout=250.0, settings=SETTINGS)
    assert {f: v["tokens"].status for f, v in found.items()} == dict.fromkeys(COVERED, "exact"), {
        family: _told(verdicts) for family, verdicts in found.items()
    }


@pytest.mark.matrix
@pytest.mark.timeout(3600)
def test_every_family_that_is_exact_is_exact_in_tiles() -> None:
    """Or refuses a feature that it refuses without tiles."""
    found = families.run(dict.fromkeys(exact_families(), FEATURES), settings=SETTINGS)
    beside = read(list(RESULTS.glob("*.json")))
    for family, verdicts in found.items():
        allowed = [run["families"][family]["features"] for run in beside if family in run["families"]]
        for feature, verdict in verdicts.items():
            statuses = {features.get(feature, {"status": "exact"})["status"] for features in allowed}
            assert verdict.status in statuses, (family, feature, _told(verdicts))


def in_tiles(tile: int) -> dict[str, Verdict]:
    """Of one rank of any world: every kind of batch."""
    size = torch.distributed.get_world_size()
    section = {"method": "ring", "size": size, "memory": {"tile_tokens": tile}}
    groups = SequenceParallelGroups.build(SequenceParallelConfig(**section))
    torch.manual_seed(0)
    model = build_model("qwen3").double()
    shard = partial(trials.shard, section=section)
    return {name: compare(model, trials.batches(model, name), shard, groups) for name in (*FEATURES, "embedded")}


@pytest.mark.parametrize(
    ("size", "tile"), [(1, 7), *(pytest.param(2, tile, marks=pytest.mark.matrix) for tile in (1, 1000)), (4, 3)]
)
def test_tied_weights_and_any_tile_on_any_number_of_ranks(size: int, tile: int) -> None:
    for verdicts in spawn(in_tiles, size, tile, timeout=120.0):
        assert {name: verdict.status for name, verdict in verdicts.items()} == dict.fromkeys(verdicts, "exact"), _told(
            verdicts
        )


Results = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(name="results")
def _results(hf_world: Callable[[int], Any]) -> Results:
    return lambda case: hf_world(2).results(case)


@pytest.mark.parametrize("case", ["zero1", "zero3", "local"])
def test_logits_are_computed_where_they_are_read_without_gradients(case: str, results: Results) -> None:
    """In training they are refused, and the loss is not touched."""
    torch.manual_seed(0)
    alone = build_model("qwen3")(**micro_batch("tokens", 0, 0, 0))
    for rank, result in enumerate(results(f"tiles_read_{case}")):
        own = Layout("zigzag", LENGTH, 2).shard(alone.logits, 1, rank) if case == "local" else alone.logits
        for way in ("read", "tuple"):
            torch.testing.assert_close(torch.tensor(result[way]), own, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(result["unlabelled"]), alone.logits, rtol=0, atol=1e-6)
        assert result["losses"] == pytest.approx([alone.loss.item()] * 4, rel=1e-6)
        assert len(result["refused"]) == 4
        for message in result["refused"]:
            assert "memory.tile_tokens" in message
            assert "torch.no_grad()" in message
        assert result["kind"] == "PendingLogits"


def test_no_tensor_has_all_classes_of_all_tokens(results: Results) -> None:
    """A tile is the most; without tiles they are seen. What ranks send is the same."""
    logits = CLASSES * LONG // 2
    (tiled, *_), (auto, *_), (whole, *_) = (results(f"tiles_{name}") for name in ("made", "made_auto", "none_made"))
    weights = CLASSES * 8
    assert tiled["largest"] == max(weights, TILE * CLASSES)
    assert whole["largest"] >= logits > tiled["largest"]
    # One tile has room for all of them.
    assert auto["largest"] == logits
    assert tiled["sent"] == auto["sent"] == whole["sent"]
    assert tiled["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert auto["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_the_covered_families_are_exact_without_tiles() -> None:
    assert set(COVERED) <= set(exact_families()), json.dumps(exact_families())
