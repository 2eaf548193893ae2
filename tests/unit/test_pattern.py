"""Patterns: reading them, telling sizes by them, and taking tensors apart and together again."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from dsp_plugin import SequenceParallelConfigError
from dsp_plugin.plans.pattern import Extra, Group, alternative, parse, unambiguous


def test_names_extras_and_numbers_are_read():
    pattern = parse("(b t) k+(s y)+2 c")
    assert pattern.names == ("b", "t", "s", "y", "c")
    assert pattern.extra_names == ("b", "t", "c")
    assert pattern.extra_place == 2
    assert [(group.before, group.behind) for group in pattern.groups] == [(None, None), ("k", "2"), (None, None)]
    assert parse("1 l 6 c").names == ("1", "l", "6", "c")


def test_a_number_is_how_many_further_tokens_there_are_on_either_side():
    assert parse("b s+3 c").groups[1] == parse("b (s)+3 c").groups[1] == Group(("s",), None, "3")
    assert parse("b 3+s c").groups[1] == Group(("s",), "3", None)
    assert parse("b s+3 c").solve((2, 9, 4), {}, "here") == {"b": 2, "s": 6, "c": 4}
    x = torch.randn(2, 9, 4)
    parts = parse("b s+3 c").take_apart(x, {"b": 2, "s": 6, "c": 4})
    assert torch.equal(parts.main, x[:, :6])
    assert torch.equal(parts.behind, x[:, 6:])
    assert parts.before is None


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("b s+k c", "b (s)+k c"),
        ("(b t) s+k c", "(b t) (s)+k c"),
        ("b s+3 c", "b (s)+3 c"),
        *(
            (text, text)
            for text in ("b k+s c", "1+s", "b k+s+j c", "b (s)+k c", "b (s t)+k c", "b k+(s t) c", "b n+k c")
        ),
        ("b s+k c | s+k c", "b (s)+k c | (s)+k c"),
    ],
)
def test_of_two_names_the_further_tokens_are_those_that_the_plan_does_not_name(text, wanted):
    assert unambiguous(text, ("b", "t", "s", "c")) == wanted


@pytest.mark.parametrize(
    "text", ["", "b t t c", "(b t) (s b) c", "(b t s c", "b (t) s)", "b t-s c", "1+s 1+t c", "b()c", "b + s c"]
)
def test_what_is_no_pattern_is_refused_with_the_place(text):
    with pytest.raises(SequenceParallelConfigError, match="my setting") as refused:
        parse(text, "my setting")
    assert "(b t) s c" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "shape", "known", "wanted"),
    [
        ("(b t) s c", (6, 5, 4), {"b": 2}, {"b": 2, "t": 3, "s": 5, "c": 4}),
        ("b 1+(s t) c", (2, 16, 4), {"t": 3}, {"b": 2, "s": 5, "t": 3, "c": 4}),
        ("b k+s c", (2, 9, 4), {"s": 7}, {"b": 2, "s": 7, "c": 4, "k": 2}),
        ("b _ t _", (2, 9, 4, 8), {}, {"b": 2, "t": 4}),
    ],
)
def test_sizes_are_told_by_shapes(text, shape, known, wanted):
    found = parse(text).solve(shape, known, "here")
    assert {name: size for name, size in found.items() if name != "_"} == wanted


@pytest.mark.parametrize(
    ("text", "shape", "known", "parts"),
    [
        ("b t s c", (2, 3, 4), {}, ["(2, 3, 4)", "4 dims"]),
        ("(b t) s c", (6, 5, 4), {}, ["b and t", "told from 6"]),
        ("(b t) s c", (7, 5, 4), {"b": 2}, ["7 entries of (b t)", "multiple of 2"]),
        ("b t c", (2, 3, 4), {"t": 5}, ["t should be 5"]),
        ("b 1+(s t) c", (2, 17, 4), {"s": 5, "t": 3}, ["1+(s t) should be 16"]),
        ("b k+s c", (2, 5, 4), {"s": 7}, ["k+s has at least 7"]),
        ("b 6 c", (2, 5, 4), {}, ["6 should be 6"]),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_arithmetic(text, shape, known, parts):
    with pytest.raises(SequenceParallelConfigError) as refused:
        parse(text).solve(shape, known, "tokens of blocks.0")
    for part in (f"tokens of blocks.0={text!r}", "plan.inputs", *parts):
        assert part in str(refused.value)


@pytest.mark.parametrize("text", ["(b t) 1+s c", "b 1+(s t)+2 c", "c b (t s)+3", "b t s c", "(b t s) c"])
def test_parts_are_those_of_einops_and_go_together_again(text):
    sizes = {"b": 2, "t": 3, "s": 5, "c": 4}
    pattern = parse(text)
    shape = []
    for group in pattern.groups:
        product = int(torch.tensor([sizes[name] for name in group.names]).prod())
        shape.append(product + int(group.before or 0) + int(group.behind or 0))
    x = torch.randn(shape, dtype=torch.float64)
    parts = pattern.take_apart(x, sizes)
    assert torch.equal(pattern.put_together(parts), x)
    along = next((dim for dim, group in enumerate(pattern.groups) if group.extended), None)
    main = x
    if along is not None:
        group = pattern.groups[along]
        front, back = int(group.before or 0), int(group.behind or 0)
        main = x.narrow(along, front, x.shape[along] - front - back)
    plain = " ".join(f"({' '.join(group.names)})" for group in pattern.groups)
    assert torch.equal(parts.main, rearrange(main, f"{plain} -> {' '.join(pattern.names)}", **sizes))
    for piece, width in ((parts.before, "before"), (parts.behind, "behind")):
        wanted = next((getattr(group, width) for group in pattern.groups if getattr(group, width)), None)
        assert (piece is None) == (wanted is None)
        if piece is not None:
            assert pattern.extra_place is not None
            assert piece.shape[pattern.extra_place] == int(wanted)
            assert piece.numel() == int(wanted) * int(
                torch.tensor([sizes[name] for name in pattern.extra_names] or [1]).prod()
            )


def test_extras_count_once_for_every_index_of_the_other_dims():
    pattern = parse("(b t) k+s+2 c")
    assert pattern.extras({"b": 2, "t": 3, "s": 5, "c": 4, "k": 1}) == (
        Extra(("b", "t", "c"), 1),
        Extra(("b", "t", "c"), 2),
    )
    assert parse("b t s c").extras({}) == ()


def test_alternatives_are_told_apart_by_their_number_of_dims():
    assert alternative("b 6 c | b l 6 c", 4, "temb").text == "b l 6 c"
    assert alternative("b 6 c | b l 6 c", 2, "temb") is None


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.fixed_dictionaries({name: st.integers(1, 4) for name in "btsc"}),
    front=st.integers(0, 2),
    back=st.integers(0, 2),
)
def test_every_tensor_survives_being_taken_apart(sizes, front, back):
    pattern = parse(f"(b t) {front}+s+{back} c")
    x = torch.randn(sizes["b"] * sizes["t"], front + sizes["s"] + back, sizes["c"])
    assert torch.equal(pattern.put_together(pattern.take_apart(x, sizes)), x)
