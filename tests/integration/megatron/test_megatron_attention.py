"""The replaced core attention against upstream's own, and what it refuses."""

from __future__ import annotations

import pytest
from megatron_workers import attention_errors, built_attention, refused_layers

from dsp_plugin.spawn import spawn

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def errors() -> list[dict[str, float]]:
    """Relative errors on each of two ranks."""
    return spawn(attention_errors, 2, timeout=150)


@pytest.mark.parametrize(
    "case",
    [
        "causal",
        "causal, its mask given",
        "causal, a mask for each sample",
        "full",
        "padding, nothing padded",
        "window",
        "window on both sides",
        "window, layer skipped",
        "scaled by the layer number",
        "own scale",
        "documents",
        "documents, a mask for each sample",
        "documents, one rank sees the border",
    ],
)
def test_equals_upstreams_dense_attention(case: str, errors: list[dict[str, float]]) -> None:
    assert max(found[case] for found in errors) <= 1e-5


@pytest.fixture(scope="module")
def refused() -> list[dict[str, str]]:
    """The errors on each of two ranks."""
    return spawn(refused_layers, 2, timeout=150)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("softmax type", ["softmax_type='off-by-one'", "vanilla"]),
        ("max logit", ["log_max_attention_logit=True"]),
        ("attention in fp8", ["fp8_dot_product_attention=True", "Set it to False"]),
        ("heads in fp8", ["fp8_multi_head_attention=True", "Set it to False"]),
        ("other attention", ["core_attention='SparseAttention'", "DotProductAttention"]),
        ("too few heads", ["heads=1", "size=2"]),
        ("another size", ["TransformerConfig.context_parallel_size=4", "context_parallel_size=2"]),
        ("another group", ["pg_collection.cp", "(0, 1)"]),
        ("other documents in each sample", ["attention_mask=", "--micro-batch-size 1"]),
        ("holes", ["attention_mask=", "--reset-attention-mask"]),
        ("documents without causality", ["attention_mask=", "other tokens than none"]),
        ("mask of another shape", ["attention_mask="]),
        ("arbitrary mask", ["attn_mask_type='arbitrary'"]),
        ("bias", ["attention_bias="]),
        ("packed", ["packed_seq_params='thd'", "document by document"]),
        ("cache", ["16 queries, 32 keys", "context_parallel_size 1"]),
    ],
)
def test_what_it_cannot_compute_is_refused_on_every_rank(
    case: str, words: list[str], refused: list[dict[str, str]]
) -> None:
    messages = {errors[case] for errors in refused}
    assert len(messages) == 1 or case == "another group", f"ranks disagree: {messages}"
    for message in messages:
        assert message.startswith(("UnsupportedError: ", "SequenceParallelConfigError: "))
        assert all(word in message for word in words), message


def test_a_refusal_leaves_the_layer_usable(refused: list[dict[str, str]]) -> None:
    assert [errors["still works"] for errors in refused] == ["", ""]


def test_the_document_border_is_seen_by_one_rank_only(refused: list[dict[str, str]]) -> None:
    assert [errors["rows changed"] for errors in refused] == ["True", "False"]


@pytest.fixture(scope="module")
def built() -> dict[str, str]:
    """What rank 0 of two built."""
    return spawn(built_attention, 2, timeout=150)[0]


def test_self_attention_is_ours_only_where_the_sequence_is_sharded(built: dict[str, str]) -> None:
    assert built["self"] == "SequenceParallelAttention"
    assert built["context parallel size 1"] == "DotProductAttention"


def test_multi_latent_attention_is_ours(built: dict[str, str]) -> None:
    if "isinstance() arg 2 must be a type" in built["mla"]:
        pytest.skip("this megatron-core cannot build multi-latent attention without Transformer Engine")
    assert built["mla"] == "SequenceParallelAttention"


@pytest.mark.parametrize("case", ["cross", "without the plugin"])
def test_what_is_not_ours_stays_upstreams(case: str, built: dict[str, str]) -> None:
    assert "Context parallelism is only supported by TEDotProductAttention" in built[case]
