"""The longest sequence that fits: memory is a straight line in length, so two runs say where it is, a third checks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

_MOST_RUNS = 12
# As a part of the longest length found: how far the shortest that does not fit may be.
_NEAR = 0.01


class Longest(NamedTuple):
    """What was found.

    Attributes:
        length: tokens; 0 where not even the shortest sequence fits.
        over: the nearest length that was tried and does not fit; None where nothing of it was tried.
        slope: bytes that a further token of the sequence costs.
        base: bytes above what there is at no tokens, by the line through the two lengths nearest to the border.
        tried: every length that was run, with its bytes.
    """

    length: int
    over: int | None
    slope: float
    base: float
    tried: dict[int, int]


def longest(excess: Callable[[int], int], step: int, start: int) -> Longest:
    """A length, in multiples of ``step``, at which ``excess`` is not above 0; a hundredth longer, or a step, it is.

    Args:
        excess: bytes by which a length is above what there is, or below; grows with length.
        step: tokens.
        start: a length to begin with, a multiple of ``step``.
    """
    tried = {length: excess(length) for length in (start, 2 * start)}
    for _ in range(_MOST_RUNS):
        low, high = _bounds(tried)
        if high is not None and high - low <= max(_NEAR * low, step):
            break
        guess = _guess(tried, low, high)
        if low:
            # What is so near that it need not be known better is shown not to fit.
            guess = max(guess, low + int(_NEAR * low))
        guess = max(guess // step * step, low + step)
        if high is not None and guess >= high:
            guess = (low + high) // 2 // step * step
        if guess in tried or guess <= 0:
            break
        tried[guess] = excess(guess)
    slope, base = _line(tried)
    low, high = _bounds(tried)
    return Longest(low, high, slope, base, dict(sorted(tried.items())))


def _guess(tried: dict[int, int], low: int, high: int | None) -> int:
    """Where a line meets 0: of those below it the last two, for what grows faster further on meets it sooner."""
    fits = sorted(length for length in tried if length <= low)
    lines = [fits[-2:]] if len(fits) > 1 else []
    lines += [[low, high]] if low and high is not None else [sorted(tried)[:2]]
    for x0, x1 in lines:
        slope = (tried[x1] - tried[x0]) / (x1 - x0)
        if slope <= 0:
            return 2 * max(tried)
        found = int(x0 - tried[x0] / slope)
        if high is None or found < high:
            return found
    return high or 0


def _bounds(tried: dict[int, int]) -> tuple[int, int | None]:
    """The longest that fits, the shortest that does not."""
    fits = [length for length, over in tried.items() if over <= 0]
    return max(fits, default=0), min((length for length in tried if length not in fits), default=None)


def _line(tried: dict[int, int]) -> tuple[float, float]:
    """Slope and value at 0 of the line through the two lengths nearest to the border."""
    _, high = _bounds(tried)
    ordered = sorted(tried)
    at = len(ordered) - 1 if high is None else max(ordered.index(high), 1)
    x0, x1 = ordered[at - 1 : at + 1]
    slope = (tried[x1] - tried[x0]) / (x1 - x0)
    return slope, tried[x0] - slope * x0
