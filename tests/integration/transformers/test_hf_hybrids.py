"""Hybrids of Transformers, told a method and a size, are what they are unsharded: losses, gradients, bytes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_hybrids import Case, built, found, sent
from preloading import preload

from dsp_plugin import SequenceParallelConfigError, SequenceParallelGroups, UnsupportedError
from dsp_plugin.patches.transformers import checked_section, trials
from dsp_plugin.patches.transformers.mixers import attention_calls, mixers_of
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

# A family of each kind of layer: gated delta rule, Mamba-2, lightning attention.
COVERING = {
    2: [
        Case("qwen3_next", "ulysses", "unlike", told="seq_idx"),
        Case("bamba", "ring", "left"),
        Case("minimax", "usp", exchange="scan"),
    ],
    3: [
        Case("qwen3_next", "ring", layout="zigzag"),
        Case("bamba", "ulysses", "alike", told="cu_seq_lens"),
        Case("mamba2", "lightseq", "recomputed", exchange="allgather"),
    ],
}
ALL = (
    *("qwen3_next", "qwen3_5_text", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "bamba", "granitemoehybrid"),
    *("falcon_h1", "nemotron_h", "zamba2", "mamba2", "minimax", "jamba", "mamba", "lfm2_moe"),
)
METHODS = ("ring", "ulysses", "usp", "lightseq")
BEYOND = {
    size: [
        *(Case(family, METHODS[(at + size) % 4]) for at, family in enumerate(ALL)),
        *(Case(family, METHODS[(at + size + 1) % 4], "recomputed") for at, family in enumerate(ALL)),
        *(
            Case(family, METHODS[(at + size + 2) % 4], rows, told=told)
            for at, family in enumerate(ALL)
            for rows, told in (("alike", "seq_idx"), ("unlike", "cu_seq_lens"))
            if family != "granitemoehybrid"
        ),
        *(Case(family, "ring", "left", layout="zigzag") for family in ALL),
        *(Case(family, "ulysses", exchange=way) for family in ALL for way in ("ring", "scan", "allgather")),
    ]
    for size in (2, 3, 4)
}


def _parameters() -> list[Any]:
    chosen = [pytest.param(size, case, id=f"{size}-{case.name}") for size in COVERING for case in COVERING[size]]
    for size, cases in BEYOND.items():
        chosen += [pytest.param(size, case, id=f"{size}-{case.name}", marks=pytest.mark.matrix) for case in cases]
    return chosen


@pytest.fixture(scope="module", name="verdicts")
def _verdicts(pytestconfig: pytest.Config) -> Callable[[int], list[dict[str, Any]]]:
    preload("transformers.modeling_utils", "hf_hybrids")
    worlds: dict[int, list[dict[str, Any]]] = {}

    def of(size: int) -> list[dict[str, Any]]:
        if size not in worlds:
            beyond = BEYOND[size] if pytestconfig.getoption("--matrix") else []
            cases = [*COVERING.get(size, []), *beyond]
            worlds[size] = spawn(found, size, cases, timeout=3000.0 if beyond else 200.0)
        return worlds[size]

    return of


@pytest.mark.parametrize(("size", "case"), _parameters())
def test_a_hybrid_is_exact(size: int, case: Case, verdicts: Callable[[int], list[dict[str, Any]]]) -> None:
    """To 1e-10 in fp64; packed rows beside documents that are alone."""
    for found_by_rank in verdicts(size):
        verdict = found_by_rank[case.name]
        assert verdict.status == "exact", f"{verdict.why} {verdict.first}"


@pytest.mark.parametrize(
    ("family", "size"),
    [
        ("qwen3_next", 3),
        *(pytest.param(f, n, marks=pytest.mark.matrix) for f in ("qwen3_next", "bamba") for n in (2, 4)),
    ],
)
def test_bytes_of_a_linear_layer_are_the_formula(family: str, size: int) -> None:
    """States, transitions and the convolution's taps; whatever the softmax layer sends goes by its own method."""
    for found_by_rank in spawn(sent, size, family, timeout=200.0):
        for phase, (measured, wanted) in found_by_rank.items():
            assert measured == wanted, phase


def test_what_a_family_is_follows_from_what_its_layers_call() -> None:
    """Linear layers and calls of the attention interface, of layers that share one attention too."""
    counts = {
        f: (len(mixers_of(m)), attention_calls(m)) for f in ("qwen3_next", "falcon_h1", "mamba2") for m in [built(f)]
    }
    assert counts == {"qwen3_next": (1, 1), "falcon_h1": (2, 2), "mamba2": (2, 0)}


def test_the_order_is_that_of_states_unless_it_is_set() -> None:
    """In zigzag order, states' inputs would be moved in every layer."""
    model = built("qwen3_next")
    section = {"method": "ring", "size": 2, "unverified_model": True}
    assert checked_section(model, section).layout == "contiguous"
    assert checked_section(model, {**section, "layout": "zigzag"}).layout == "zigzag"
    assert checked_section(built("llama"), section).layout == "auto"


def test_linear_layers_of_other_kinds_are_refused() -> None:
    """And so is LASP for a model without any."""
    section = {"method": "ring", "size": 2, "unverified_model": True}
    with pytest.raises(UnsupportedError, match=r"config\.layer_types.*linear_attention.*known are.*mamba2_chunk_scan"):
        checked_section(built("recurrent_gemma"), section)
    with pytest.raises(SequenceParallelConfigError, match=r"method='lasp'.*LlamaForCausalLM has none"):
        checked_section(built("llama"), {"method": "lasp", "size": 2})


def test_a_removed_model_is_as_it_was() -> None:
    """The functions of its file are Transformers' own outside of passes, and its layers' forward again its class's."""
    model = built("qwen3_next")
    (mixer,) = mixers_of(model)
    names = inspect.unwrap(type(mixer).forward).__globals__
    before = names["causal_conv1d_fn"]
    section = {"method": "ulysses", "size": 1, "unverified_model": True}
    handle = trials.shard(model, SequenceParallelGroups.single(), section)
    batch = trials.batches(model, "tokens")[0]
    with torch.no_grad():
        sharded = model(**batch).loss
        handle.remove()
        assert "forward" not in vars(mixer)
        assert names["causal_conv1d_fn"] is before
        torch.testing.assert_close(model(**batch).loss, sharded, rtol=1e-5, atol=0)


def test_documents_by_positions_alone_pass_states_on_and_a_warning_says_so() -> None:
    """As unsharded."""
    model = built("qwen3_next")
    trials.shard(model, SequenceParallelGroups.single(), {"method": "ulysses", "size": 1})
    with pytest.warns(UserWarning, match=r"do not look at positions.*seq_idx"):
        model(**trials.batches(model, "packed")[0])


@pytest.mark.parametrize(
    ("places", "match"),
    [((1, slice(8, 11)), "padding in the midst of a document"), ((1, slice(0, 6)), "a loss at padding in front")],
)
def test_padding_that_states_go_through_is_refused(places: Any, match: str) -> None:
    """Before anything is sent."""
    model = built("bamba")
    trials.shard(model, SequenceParallelGroups.single(), {"method": "ulysses", "size": 1})
    batch = trials.batches(model, "tokens")[0]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][places] = 0
    if places[1].start:
        batch["labels"][1, 8:12] = -100
    with pytest.raises(UnsupportedError, match=match):
        model(**batch)
