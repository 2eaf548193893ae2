"""Odd models and attentions: each is what an oracle of its own calls legal, or refused in our own words."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from odd_values import BORDERS, NUMBERS, SOME, VALUES, whole

from dsp_plugin import MaskSpec, SequenceParallelConfig, SequenceParallelConfigError
from dsp_plugin.kernels.spec import AttentionSpec

BATCH = {"batch": {"input_ids": 1}, "attention": ["layers.*.attn"], "gather_output": 1}
BASES: list[dict[str, Any]] = [
    {"method": "ulysses", "size": 4, **BATCH},
    {"method": "ring", "size": 2, **BATCH},
    {"method": "usp", "ulysses_size": 2, "ring_size": 2, **BATCH},
    {"method": "lightseq", "size": 3, **BATCH},
    {"method": "lasp", "size": 4, **BATCH},
]
COUNTS = st.one_of(st.integers(1, 16), st.integers(1, 16), NUMBERS)


def counts(value: Any) -> bool:
    return whole(value, 1, 2**20)


@SOME
@given(
    base=st.sampled_from(BASES),
    heads=COUNTS,
    kv_heads=st.one_of(st.none(), COUNTS),
    length=st.one_of(st.none(), COUNTS),
    tensor_parallel_size=st.one_of(st.just(1), COUNTS),
)
def test_no_odd_model_is_accepted_or_refused_by_a_stranger(
    base: dict[str, Any], heads: Any, kv_heads: Any, length: Any, tensor_parallel_size: Any
) -> None:
    config = SequenceParallelConfig(**base)
    fits = (
        counts(heads)
        and (kv_heads is None or counts(kv_heads))
        and (length is None or whole(length, 0, 2**63 - 1))
        and counts(tensor_parallel_size)
        and heads % tensor_parallel_size == 0
    )
    try:
        config.check_model(heads=heads, kv_heads=kv_heads, length=length, tensor_parallel_size=tensor_parallel_size)
    except SequenceParallelConfigError:
        # Every method serves one rank's worth of one head to each.
        assert not (fits and kv_heads is None and tensor_parallel_size == 1 and heads % config.size == 0)
        return
    assert fits


def real(value: Any) -> bool:
    return type(value) in (int, float) and -1.7e308 < value < 1.7e308


@SOME
@given(
    mask=st.one_of(st.just(MaskSpec(causal=True)), VALUES),
    scale=st.one_of(st.none(), st.floats(0.1, 2), VALUES),
    dropout_p=st.one_of(st.just(0.0), st.floats(0, 1), VALUES),
    dropout_seed=st.one_of(st.none(), st.integers(), VALUES),
    kernel=st.one_of(st.just("auto"), VALUES),
    q_per_kv=st.one_of(st.none(), BORDERS),
    offsets=st.tuples(*2 * [st.one_of(st.just(0), NUMBERS)]),
)
def test_no_odd_attention_is_accepted_or_refused_wrongly(
    mask: Any, scale: Any, dropout_p: Any, dropout_seed: Any, kernel: Any, q_per_kv: Any, offsets: tuple[Any, Any]
) -> None:
    fits = (
        isinstance(mask, MaskSpec)
        and (scale is None or real(scale))
        and real(dropout_p)
        and 0 <= dropout_p < 1
        and (type(dropout_seed) is int or (dropout_seed is None and dropout_p == 0))
        and type(kernel) is str
        and (
            q_per_kv is None
            or (
                type(q_per_kv) in (list, tuple, range, set, frozenset, dict)
                and all(whole(count, 0, 2**63 - 1) for count in q_per_kv)
            )
        )
        and all(whole(offset, 0, 2**63 - 1) for offset in offsets)
    )
    try:
        spec = AttentionSpec(mask, scale, dropout_p, dropout_seed, kernel, q_per_kv, *offsets)
    except SequenceParallelConfigError:
        assert not fits
        return
    assert fits
    assert (spec.scale, spec.dropout_p, spec.dropout_seed) == (scale, dropout_p, dropout_seed)
    assert spec.q_per_kv == (None if q_per_kv is None else tuple(q_per_kv))
    assert spec.narrow(range(1, 2)).head_offset == offsets[0] + 1
