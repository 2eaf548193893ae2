"""The digest tells different inputs apart."""

from __future__ import annotations

import pytest
import torch

from dsp_plugin.training.same_sample import SAMPLED_ELEMENTS, combined, described_leaves, digest

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def of(*args: object, **kwargs: object) -> int:
    """The number that peers compare."""
    return combined(list(described_leaves(args, kwargs)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_changed_element_changes_the_digest(dtype: torch.dtype) -> None:
    """Wherever it is, and for every dtype."""
    tensor = (torch.rand(5, 7) * 100).to(dtype)
    assert digest(tensor) == digest(tensor.clone())
    for place in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1)[place] = not changed.view(-1)[place] if dtype == torch.bool else changed.view(-1)[place] + 1
        assert digest(changed) != digest(tensor)


def test_order_changes_the_digest() -> None:
    """The same tokens in another order are another sample."""
    tokens = torch.randperm(50)
    assert digest(tokens.flip(0)) != digest(tokens)


def test_memory_order_does_not_change_the_digest() -> None:
    """A transposed view holds the same sample."""
    tensor = torch.rand(4, 6)
    assert digest(tensor.t().contiguous()) == digest(tensor.t())


def test_large_inputs_are_sampled_evenly() -> None:
    """Different random inputs differ in the sample; the last element of an evenly divided input is not in it."""
    large = torch.rand(4 * SAMPLED_ELEMENTS)
    assert digest(large) == digest(large.clone())
    assert digest(large) != digest(torch.rand(4 * SAMPLED_ELEMENTS))


def test_names_shapes_dtypes_and_nesting_count() -> None:
    """Two peers agree only if the whole call does."""
    x, y = torch.rand(2, 3), torch.rand(2, 3)
    calls = [
        of(x, y),
        of(y, x),
        of(x),
        of(x, video=y),
        of(x, labels=y),
        of({"x": x, "y": y}),
        of([x, y]),
        of(x.view(3, 2), y),
        of(x, y, 1),
        of(x, y, 2),
        of(x, y, "text"),
        of(x, y, True),
    ]
    assert len(set(calls)) == len(calls)
    assert of(x, video={"a": [y, 3]}) == of(x.clone(), video={"a": [y.clone(), 3]})
    assert of(x, object()) == of(x, object()), "what cannot be compared is left out"


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(0, 3), torch.tensor(1.0), torch.rand(3, dtype=torch.complex64), torch.rand(2, 2).to_sparse()],
    ids=["empty", "scalar", "complex", "sparse"],
)
def test_odd_tensors_have_a_digest(tensor: torch.Tensor) -> None:
    """Whatever a forward takes must not fail in a check."""
    assert digest(tensor) == digest(tensor.clone())
