"""What a script sees of a sharded model beside its loss, and what it must not see."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_cases import METHODS
from hf_models import LENGTH, build_model, micro_batch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsp_plugin import Layout, SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.patches.transformers import ShardedCausalLM, serves

Results = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(name="results")
def _results(hf_world: Callable[[int], Any]) -> Results:
    return lambda case: hf_world(2).results(case)


def test_logits_are_whole_where_they_are_read(results: Results) -> None:
    """Local ones are those at the rank's positions; loss is the whole sequence's in training and evaluation."""
    torch.manual_seed(0)
    alone = build_model("llama")(**micro_batch("tokens", 0, 0, 0))
    layout = Layout("zigzag", LENGTH, 2)
    for rank, result in enumerate(results("logits")):
        torch.testing.assert_close(torch.tensor(result["whole"]), alone.logits, rtol=0, atol=1e-6)
        torch.testing.assert_close(torch.tensor(result["read"]), alone.logits, rtol=0, atol=1e-6)
        own = layout.shard(alone.logits, 1, rank)
        assert result["gathered"] == own.numel() * own.element_size()
        torch.testing.assert_close(torch.tensor(result["local"]), own, rtol=0, atol=1e-6)
        assert result["losses"] == pytest.approx([alone.loss.item()] * 3, rel=1e-6)
        assert not result["cache"]


def test_attention_drops_the_same_by_every_method_and_in_recomputation(results: Results) -> None:
    """Two steps: the losses agree, and so do the gradients that led to the second."""
    for result in results("dropout"):
        assert result["none"] != pytest.approx(result["ring"], rel=1e-4)
        for name in (*METHODS, "plain", "reentrant"):
            assert result[name] == pytest.approx(result["ring"], rel=1e-6), name


def test_forward_passes_of_two_lengths_before_their_backward_passes(results: Results) -> None:
    """Recomputed layers get the layout of the forward pass that they belong to."""
    (first, *_) = results("two_lengths")
    for checkpointing in ("plain", "reentrant"):
        assert first[checkpointing] == pytest.approx(first["kept"], rel=1e-5)


def test_other_models_stay_as_they_are(results: Results) -> None:
    """One of the same config object, and the model itself when hooks are taken off; nothing of ours is saved."""
    for result in results("neighbours"):
        model, other = result["before"]
        assert result["other"] == other
        assert result["again"] == pytest.approx(model, rel=1e-6)
        assert result["alone"] == pytest.approx(model, rel=1e-6)
        assert len(result["names"]) == 1
        assert result["left"] == []
        assert result["implementations"] == ["eager"] * 3
        assert "sequence_parallel" not in result["saved"]


def test_nothing_is_left_of_a_model_that_is_gone() -> None:
    """Its attention function leaves Transformers' table, and nothing there keeps the model alive."""
    config = SequenceParallelConfig(method="ring", size=1)
    model = build_model("llama")
    expected = model(**micro_batch("tokens", 0, 0, 0)).loss.item()
    names = set(ALL_ATTENTION_FUNCTIONS)
    ShardedCausalLM(model, config, SequenceParallelGroups.single())
    assert set(ALL_ATTENTION_FUNCTIONS) - names
    loss = model(**micro_batch("tokens", 0, 0, 0)).loss
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    alive = weakref.ref(model)
    del model, loss
    gc.collect()
    assert alive() is None
    assert set(ALL_ATTENTION_FUNCTIONS) == names


def test_transformers_is_not_imported_for_other_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is one of Transformers' has imported it."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    assert not serves(nn.Linear(2, 2), SequenceParallelConfig(method="ring", size=2))
    assert "transformers" not in sys.modules


@pytest.mark.parametrize(
    ("section", "ours"),
    [
        ({"method": "ring", "size": 2}, True),
        ({"method": "dsp", "size": 2}, False),
        ({"method": "ulysses", "size": 2, "plan": "module:plan"}, False),
        (
            {"method": "ulysses", "size": 2, "batch": {"x": 1}, "attention": ["a"], "gather_output": 1},
            False,
        ),
    ],
)
def test_a_described_model_is_sharded_as_described(section: dict[str, Any], ours: bool) -> None:
    """Settings that say where sequences are go before what we know of Transformers."""
    assert serves(build_model("llama"), SequenceParallelConfig(**section)) is ours
