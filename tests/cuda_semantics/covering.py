"""Of a large table of cases, few in which every two values of two columns meet somewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple
from itertools import combinations
from typing import Any, TypeVar

import pytest

Row = TypeVar("Row")


def covering(cases: Sequence[Row]) -> list[Row]:
    """A subset, the same every time, in which all pairs of values occur that do in the whole; cases are dataclasses."""
    pairs = {case: frozenset(combinations(enumerate(astuple(case)), 2)) for case in cases}  # type: ignore[call-overload]
    left = set().union(*pairs.values())
    chosen: list[Row] = []
    while left:
        best = max(cases, key=lambda case: len(pairs[case] & left))
        chosen.append(best)
        left -= pairs[best]
    return chosen


def marked(cases: Sequence[Row], kept: Iterable[Row]) -> list[Any]:
    """The cases as parameters, those that are not kept for ``--matrix``."""
    kept = set(kept)
    return [pytest.param(case, id=str(case), marks=[] if case in kept else [pytest.mark.matrix]) for case in cases]
