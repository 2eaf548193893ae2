"""MaskSpec: band and documents against the dense mask of its definition; malformed masks refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsp_plugin import MaskSpec, SequenceParallelConfigError, linear_attention, short_convolution
from dsp_plugin.kernels.reference import dense_mask
from dsp_plugin.mask import document_starts

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
        ({"window": (True, 0)}, ["window=(True, 0)", "count of tokens"]),
        ({"causal": "no"}, ["causal='no'", "not str"]),
        ({"cu_seqlens": (0, 2.5, 5)}, ["cu_seqlens=2.5", "integer", "not float"]),
        ({"cu_seqlens": (0, 2.0, 5)}, ["cu_seqlens=2.0", "integer", "not float"]),
        ({"cu_seqlens": (False, True, 5)}, ["cu_seqlens=False", "not bool"]),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, ["cu_seqlens=0.0", "not float"]),
        ({"cu_seqlens": torch.tensor([False, True])}, ["cu_seqlens=False", "not bool"]),
        ({"cu_seqlens": [0, torch.tensor(True)]}, ["not Tensor tensor(True)"]),
        ({"cu_seqlens": np.array([0, 2.5])}, ["integer", "not float"]),
        ({"cu_seqlens": "045"}, ["cu_seqlens='045'", "sequence of integers"]),
        ({"cu_seqlens": 5}, ["cu_seqlens=5", "sequence of integers"]),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, ["cu_seqlens=[0, 5]", "integer"]),
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


@pytest.mark.parametrize("kind", [tuple, list, np.array, torch.tensor, lambda borders: map(np.int32, borders)])
def test_borders_and_windows_may_be_numpys_or_tensors(kind):
    mask = MaskSpec(window=(np.int64(3), torch.tensor(0)), cu_seqlens=kind([0, 2, 5]))
    assert mask == MaskSpec(window=(3, 0), cu_seqlens=(0, 2, 5))
    assert all(type(number) is int for number in (*mask.window, *mask.cu_seqlens))
    assert document_starts(kind([0, 2, 5]), 5) == (2,)


@pytest.mark.parametrize("borders", [(0, 2.5, 5), torch.tensor([0.0, 2.5, 5.0]), (0, True, 5)])
def test_borders_of_linear_attention_are_not_cut_to_integers_either(borders):
    x = torch.ones(1, 5, 1, 2)
    with pytest.raises(SequenceParallelConfigError, match=r"cu_seqlens.*integer"):
        linear_attention(x, x, x, cu_seqlens=borders)
    with pytest.raises(SequenceParallelConfigError, match=r"cu_seqlens.*integer"):
        short_convolution(x[:, :, 0], torch.ones(2, 2), cu_seqlens=borders)


def test_borders_that_do_not_end_at_the_length_are_refused():
    with pytest.raises(SequenceParallelConfigError) as refused:
        MaskSpec(cu_seqlens=(0, 4)).documents(8)
    for part in ("cu_seqlens=(0, 4)", "last border is 4", "8 tokens", "not of a shard"):
        assert part in str(refused.value)
