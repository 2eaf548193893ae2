"""Values that a setting may be given, odd ones most of all, and how many of them are tried."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

WHOLE = 2000
SOME = settings(max_examples=WHOLE if "--matrix" in sys.argv else 400, deadline=None, derandomize=True, database=None)


def whole(value: Any, least: int, most: float = math.inf) -> bool:
    return type(value) is int and least <= value <= most


ODD: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 4, 6, -1, 64, 2**20, 2**20 + 1, 2**31, 10**18, 2**64, 10**400),
    *(0.5, 2.0, -1.5, math.inf, -math.inf, math.nan, 1e300, 4 + 0j),
    *("", " ", "4", "1", "true", "False", "null", "inf", "auto", " auto", "ring ", "RING", "Ulysses", "2\n", "a\x00b"),
    *("zigzag", "striped", "contiguous", "scan", "strided", "input", "math", "keep_attention", "usp", "labels"),
    *("a:b", ".a:b", "a.:b", "a:b:c", "a:b\n", "1a:b", "a:", ":b", "a-b:c", "class:b", "päckchen.plan:name"),
    *("input_ids", "inputs.0", "inputs.", "x y", "3d", "/no/such/folder", "\ud800", "٣", b"ulysses", b""),
    *([], (), {}, [""], ["a", 1], ["layers.*.attn"], ("a", "b"), "attn", {"attn"}, frozenset({"a"}), [["a"]]),
    *({"labels": 1}, {"labels": True}, {"labels": "1"}, {"labels": 1.0}, {1: 1}, {"": 1}, {"x y": 1}, {"a": 99}),
    *({"labels": "labels"}, {"ignore_index": -1}, {"ignore_index": 2**80}, {"label": "x"}, {"ignore_index": True}),
    *(object, len, range(2), Namespace(), Path("runs")),
]
VALUES = st.one_of(st.sampled_from(ODD), st.integers(-3, 13), st.text(max_size=3), st.floats())
NUMBERS = st.one_of(st.integers(-2, 9), st.sampled_from([*ODD, [0, 4], (0, 2, 4), (0, 3, 2, 4), (0, 4.0), (None, 0)]))
BORDERS = st.one_of(NUMBERS, st.lists(NUMBERS, max_size=4), st.lists(st.integers(0, 9), max_size=4).map(sorted))


def borders_fit(borders: Any, length: int | None = None) -> bool:
    if (
        type(borders) not in (list, tuple, range)
        or len(borders) < 2
        or not all(whole(at, 0, 2**63 - 1) for at in borders)
    ):
        return False
    return borders[0] == 0 and all(a <= b for a, b in pairwise(borders)) and length in (None, borders[-1])
