"""An attention is described once: what it is narrowed to, what it refuses, and that nobody spells it out again."""

from __future__ import annotations

import ast
from dataclasses import fields

import pytest
import torch
from rooms import ROOT, files
from test_kernels_parity import Shape, make

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.kernels import AttentionSpec, attention, prepare
from dsp_plugin.kernels.blocks import blocks
from dsp_plugin.mask import MaskSpec

pytestmark = pytest.mark.timeout(60)

# The oracle judges all others and so shares no code with them, nor a description.
ORACLE = "dense_attention"
# What linear attention is told is its own; chunks and states have a scale and no mask.
LINEAR = ("linear", "lasp", "convolution", "halo", "state_exchange")


def test_a_description_is_narrowed_to_a_range_of_heads_twice_over() -> None:
    spec = AttentionSpec(MaskSpec(causal=True), dropout_p=0.1, dropout_seed=3)
    narrowed = spec.narrow(range(4, 8)).narrow(range(1, 3), (1, 1))
    assert (narrowed.head_offset, narrowed.q_per_kv) == (5, (1, 1))
    assert narrowed.mask == spec.mask
    dropout = narrowed.dropout(range(3), range(2, 9))
    assert dropout is not None
    assert (dropout.head_offset, dropout.k_positions) == (5, range(2, 9))
    assert AttentionSpec().dropout(range(3), range(3)) is None


def test_heads_served_unevenly_are_cut_where_the_number_changes() -> None:
    q, k, v, _ = make(Shape(heads=8, kv_heads=4))
    call = prepare(q, k, v, AttentionSpec(q_per_kv=(1, 1, 0, 6), head_offset=2))
    assert not call.is_even
    cut = [(even.spec.head_offset, heads, kv) for even, heads, kv in call.evenly()]
    assert cut == [(2, slice(0, 2), slice(0, 2)), (4, slice(2, 8), slice(3, 4))]
    assert all(even.is_even for even, _, _ in call.evenly())


def test_a_block_gets_its_band_and_its_part_of_the_dropout() -> None:
    q, k, v, _ = make(Shape(q_len=6, k_len=6))
    spec = AttentionSpec(MaskSpec(causal=True, cu_seqlens=(0, 2, 6)), scale=0.5, dropout_p=0.2, dropout_seed=1)
    call = prepare(q, k, v, spec)
    first, second = blocks(spec.mask, range(6), range(6))
    assert call.of_block(first, range(6), range(6)).band == (None, 0)
    of_second = call.of_block(second, range(6), range(6))
    assert of_second.scale == 0.5
    assert of_second.dropout is not None
    assert (of_second.dropout.q_positions, of_second.dropout.k_positions) == (range(2, 6), range(2, 6))
    assert call.within_documents().spec.mask == MaskSpec(causal=True)


def test_what_is_wrong_by_itself_is_refused_where_it_is_written() -> None:
    with pytest.raises(SequenceParallelConfigError, match=r"dropout_p=-0\.1"):
        AttentionSpec(dropout_p=-0.1, dropout_seed=1)
    with pytest.raises(SequenceParallelConfigError, match="dropout_seed"):
        AttentionSpec(dropout_p=0.5)


def test_nothing_said_is_attention_to_everything() -> None:
    q, k, v, _ = make(Shape())
    torch.testing.assert_close(attention(q, k, v), attention(q, k, v, AttentionSpec(MaskSpec())))


def test_no_method_and_no_kernel_spells_the_description_out() -> None:
    """A new modifier must touch the description and the kernels that know it, and nothing in between."""
    described = {field.name for field in fields(AttentionSpec)}
    offenders = []
    for path in (*files("dsp_plugin/methods"), *files("dsp_plugin/kernels")):
        if path.stem.startswith(LINEAR):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != ORACLE:
                named = {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)} & described
                if len(named) > 1:
                    offenders.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {sorted(named)}")
    assert not offenders, "\n".join(offenders)
