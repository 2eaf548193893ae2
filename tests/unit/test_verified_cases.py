"""The cases that `verify` runs: those of its own choice, and what a user fixes."""

from __future__ import annotations

import pytest

from dsp_plugin import MaskSpec
from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.state_exchange import EXCHANGES
from dsp_plugin.verification import default_cases, parse_mask, refusal

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(
    ("text", "length", "mask"),
    [
        ("causal", 9, MaskSpec(causal=True)),
        ("full", 9, MaskSpec()),
        ("window:3", 9, MaskSpec(window=(3, 0))),
        ("window:3,2", 9, MaskSpec(window=(3, 2))),
        ("packed:4,5", 9, MaskSpec(cu_seqlens=(0, 4, 9))),
        ("causal+window:2+packed:1,8", 9, MaskSpec(True, (2, 0), (0, 1, 9))),
        ("full+packed:9", 9, MaskSpec(cu_seqlens=(0, 9))),
        ("window", 40, MaskSpec(window=(10, 5))),
        ("causal+packed", 9, MaskSpec(causal=True, cu_seqlens=(0, 3, 4, 9))),
        ("packed", 1, MaskSpec(cu_seqlens=(0, 0, 1))),
    ],
)
def test_masks_are_read_as_written(text: str, length: int, mask: MaskSpec) -> None:
    assert parse_mask(text, length) == mask


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.kind != "linear"])
def test_default_cases_cover_what_a_method_must_pass(method: str, size: int) -> None:
    cases = default_cases(method, size)
    assert {(case.heads, case.kv_heads) for case in cases} == {(6, 2), (8, 1), (7, 7)}
    assert {case.layout for case in cases} == set(METHODS[method].layouts)
    assert {case.batch for case in cases} == {2}
    masks = {case.mask for case in cases}
    assert {mask.causal for mask in masks} == {True, False}
    kinds = {(mask.window is not None, mask.cu_seqlens is not None) for mask in masks}
    assert kinds == {(False, False), (True, False), (False, True), (True, True)}
    if METHODS[method].kind == "switch":
        assert {len(case.grid or ()) for case in cases} == {2, 3}
        assert size == 1 or all(case.grid and case.grid[0] % size and case.grid[-1] % size for case in cases)
    else:
        assert all(case.length % 2 for case in cases)
    assert len(set(cases)) == len(cases)
    assert any(refusal(case) is None for case in cases)


def test_what_is_given_is_fixed_and_the_rest_varies() -> None:
    cases = default_cases("ulysses", 4, {"heads": 12, "length": 21, "mask": "causal", "batch": 3})
    assert {(case.heads, case.length, case.batch) for case in cases} == {(12, 21, 3)}
    assert {case.kv_heads for case in cases} == {1, 6, 12}
    assert {case.kv_heads for case in default_cases("ulysses", 4, {"kv_heads": 3})} == {3}
    assert all(refusal(case) is None for case in default_cases("ulysses", 4, {"kv_heads": 3}))
    assert {case.length for case in default_cases("ulysses", 2, {"mask": "packed:3,4"})} == {7}
    assert {case.grid for case in default_cases("dsp", 2, {"length": 12})} == {(3, 4)}
    assert {case.grid[0] for case in default_cases("dsp", 2, {"mask": "packed:3,4"}) if case.grid} == {7}


def test_what_is_given_is_fixed_for_linear_attention_too() -> None:
    fixed = {"decay": "delta", "exchange": "scan", "heads": 12, "length": 21, "batch": 3, "head_dim": 8, "seed": 5}
    cases = default_cases("lasp", 4, fixed)
    assert len(cases) > 5
    assert all(getattr(case, name) == value for case in cases for name, value in fixed.items())
    assert {case.kv_heads for case in cases} == {1, 6, 12}
    assert all(sum(case.sizes) == 21 for case in cases if case.sizes)
    assert {case.decay for case in default_cases("lasp", 4, {"exchange": "auto"})} == set(DECAYS)
    assert {case.exchange for case in default_cases("lasp", 4, {"decay": "head"})} == set(EXCHANGES)
    packed = default_cases("lasp", 2, {"mask": "causal+packed:3,4"})
    assert {(case.length, case.mask.cu_seqlens) for case in packed} == {(7, (0, 3, 7))}
    full = {case.decay: refusal(case) for case in default_cases("lasp", 3, {"mask": "full"})}
    assert {decay for decay, reason in full.items() if reason is None} == {"none"}
    assert {case.layout for case in default_cases("lasp", 3, {"layout": "zigzag"})} == {"zigzag"}
    whole = default_cases("lasp", 3, {"mask": MaskSpec(causal=True)})
    assert {case.mask for case in whole} == {MaskSpec(causal=True)}
