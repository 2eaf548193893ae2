"""MaskSpec: band and documents against the dense mask of its definition; malformed masks refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsp_plugin import MaskSpec, SequenceParallelConfigError
from dsp_plugin.kernels.reference import dense_mask

sides = st.one_of(st.none(), st.integers(0, 6))


@st.composite
def masks(draw) -> tuple[MaskSpec, int]:
    length = draw(st.integers(1, 14))
    inner = draw(st.lists(st.integers(0, length), max_size=4))
    return (
        MaskSpec(
            causal=draw(st.booleans()),
            window=draw(st.one_of(st.none(), st.tuples(sides, sides))),
            cu_seqlens=draw(st.one_of(st.none(), st.just((0, *sorted(inner), length)))),
        ),
        length,
    )


def visible(mask: MaskSpec, i: int, j: int) -> bool:
    """The definition, one pair at a time."""
    left, right = mask.window or (None, None)
    borders = mask.cu_seqlens
    return (
        (not mask.causal or j <= i)
        and (left is None or j - i >= -left)
        and (right is None or j - i <= right)
        and (borders is None or any(a <= i < b and a <= j < b for a, b in pairwise(borders)))
    )


@settings(max_examples=200, deadline=None)
@given(masks())
def test_band_and_documents_say_what_the_definition_says(case):
    mask, length = case
    left, right = mask.band()
    document = {position: number for number, run in enumerate(mask.documents(length)) for position in run}
    assert sorted(document) == list(range(length))
    positions = torch.arange(length)
    dense = dense_mask(mask, positions, positions)
    for i in range(length):
        for j in range(length):
            seen = visible(mask, i, j)
            in_band = (left is None or j - i >= -left) and (right is None or j - i <= right)
            assert (in_band and document[i] == document[j]) == seen
            assert bool(dense[i, j]) == seen


def test_empty_documents_disappear():
    assert MaskSpec(cu_seqlens=(0, 0, 3, 3, 5, 5)).documents(5) == (range(3), range(3, 5))
    assert MaskSpec().documents(4) == (range(4),)


def test_a_mask_is_a_value_whatever_it_was_made_of():
    mask = MaskSpec(window=[3, 0], cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))
    assert mask == MaskSpec(window=(3, 0), cu_seqlens=(0, 2, 5))
    assert len({mask, MaskSpec(window=(3, 0), cu_seqlens=(0, 2, 5))}) == 1
    assert mask.describe() == "full+window(3, 0)+packed(2)"
    assert MaskSpec(causal=True).describe() == "causal"


@pytest.mark.parametrize(
    ("settings_", "parts"),
    [
        ({"window": (-1, 0)}, ["window=(-1, 0)", "None (not -1)", "Write (1023, 0)"]),
        ({"window": (1, 2, 3)}, ["window=(1, 2, 3)", "(left, right)"]),
        ({"window": 128}, ["window=128", "(left, right)"]),
        ({"window": (1.5, 0)}, ["window=(1.5, 0)", "count of tokens"]),
        ({"cu_seqlens": (1, 4)}, ["cu_seqlens=(1, 4)", "start at 0"]),
        ({"cu_seqlens": (0, 4, 2)}, ["cu_seqlens=(0, 4, 2)", "never decrease"]),
        ({"cu_seqlens": (0,)}, ["cu_seqlens=(0,)", "end at the sequence length"]),
        ({"cu_seqlens": ()}, ["cu_seqlens=()"]),
    ],
)
def test_malformed_masks_are_refused(settings_, parts):
    with pytest.raises(SequenceParallelConfigError) as refused:
        MaskSpec(**settings_)
    for part in parts:
        assert part in str(refused.value)


def test_borders_that_do_not_end_at_the_length_are_refused():
    with pytest.raises(SequenceParallelConfigError) as refused:
        MaskSpec(cu_seqlens=(0, 4)).documents(8)
    for part in ("cu_seqlens=(0, 4)", "last border is 4", "8 tokens", "not of a shard"):
        assert part in str(refused.value)
