"""P = U * R: the sizes of a sequence group, completed from what the user gave."""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.integers import integer_of
from dsp_plugin.methods.method import Method


class Sizes(NamedTuple):
    """P, U and R."""

    size: int
    ulysses: int
    ring: int


def complete_sizes(
    method: Method,
    size: int | None,
    ulysses: int | None,
    ring: int | None,
    heads: int | None,
    setting: str = "method",
) -> Sizes:
    """The sizes that follow from those given.

    Args:
        method: whose axes the sizes are; under a linear method, the one that serves softmax layers beside it.
        heads: query heads on one tensor-parallel rank, if known: no more Ulysses ranks than these.
        setting: by which ``method`` was chosen, for errors.

    Raises:
        SequenceParallelConfigError: too few are given, they contradict each other, or the method lacks an axis.
    """
    if size is None:
        if ulysses is None and ring is None:
            raise SequenceParallelConfigError(
                setting="size",
                why="missing: how many ranks share one sequence",
                remedy="set size to a divisor of the number of GPUs",
            )
        size = (ulysses or 1) * (ring or 1)
    for axis, given in (("ulysses", ulysses), ("ring", ring)):
        if axis not in method.axes and given not in (None, 1):
            (own,) = method.axes
            raise SequenceParallelConfigError(
                setting=f"{axis}_size",
                value=given,
                why=f"{setting} {method.name} has no {axis}: {size} ranks = {own}_size {size} * {axis}_size 1",
                remedy=f"drop {axis}_size",
            )
    if "ring" not in method.axes:
        ring = 1
    if "ulysses" not in method.axes:
        ulysses = 1
    if ulysses is None and ring is None:
        ulysses = largest_ulysses_size(size, heads)
    if ulysses is None:
        assert ring is not None
        ulysses = size // ring if size % ring == 0 else 1
    if ring is None:
        ring = size // ulysses if size % ulysses == 0 else 1
    if ulysses * ring != size:
        raise SequenceParallelConfigError(
            setting="size",
            value=size,
            why=f"ulysses_size * ring_size = {ulysses} * {ring} = {ulysses * ring}, not {size}",
            remedy="set size alone, or sizes whose product is size",
        )
    return Sizes(size, ulysses, ring)


def largest_ulysses_size(size: int, heads: int | None) -> int:
    """The most Ulysses ranks that the heads allow and one node holds, for the all-to-all is the dearer neighbour.

    Divisors of the head count are preferred, so that ranks compute alike. The node is what torchrun says it is
    (``LOCAL_WORLD_SIZE``); without it all ranks are taken to be on one.
    """
    node = integer_of("LOCAL_WORLD_SIZE", size)
    divisors = {u for low in range(1, isqrt(size) + 1) if size % low == 0 for u in (low, size // low)}
    fitting = [u for u in divisors if u <= node and (heads is None or u <= heads)]
    even = [u for u in fitting if heads is None or heads % u == 0]
    return max(even, default=max(fitting))
