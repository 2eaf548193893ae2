"""Masks as the command line writes them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.mask import MaskSpec


def packed_length(mask: Any) -> int | None:
    """The length that a mask, or text for `parse_mask`, with explicit documents implies; None if it implies none."""
    if isinstance(mask, MaskSpec):
        return mask.cu_seqlens[-1] if mask.cu_seqlens is not None else None
    for term in str(mask or "").split("+"):
        name, _, numbers = term.partition(":")
        if name == "packed" and numbers:
            return sum(_counts(term, numbers))
    return None


def parse_mask(text: str, length: int) -> MaskSpec:
    """Read a mask as the command line takes it.

    ``causal``, ``full``, ``window:LEFT[,RIGHT]`` (RIGHT is 0 when left out), ``packed:L1,L2,...`` (document lengths),
    or several of them joined by ``+``. ``window`` and ``packed`` alone take sizes that suit ``length``.

    Raises:
        SequenceParallelConfigError: it does not parse, or the documents do not add up to ``length``.
    """
    causal, window, borders = False, None, None
    seen: set[str] = set()
    for term in text.split("+"):
        name, _, numbers = term.partition(":")
        if name not in _TERMS or (numbers and name in ("causal", "full")):
            raise _bad_mask(text, f"{term!r} is not one of causal, full, window:LEFT[,RIGHT], packed:L1,L2,...")
        if name in seen or {"causal", "full"} <= seen | {name}:
            raise _bad_mask(text, f"{term!r} repeats or contradicts what is before it")
        seen.add(name)
        counts = _counts(text, numbers) if numbers else _TERMS[name](length)
        if name == "causal":
            causal = True
        elif name == "window":
            if len(counts) > 2:
                raise _bad_mask(text, f"a window has a left and a right side, not {len(counts)} numbers")
            window = (counts[0], counts[1] if len(counts) == 2 else 0)
        elif name == "packed":
            if sum(counts) != length:
                total = " + ".join(map(str, counts))
                raise _bad_mask(text, f"documents of {total} = {sum(counts)} tokens do not fill the {length} there are")
            borders = (0, *accumulate(counts))
    return MaskSpec(causal=causal, window=window, cu_seqlens=borders)


_TERMS: dict[str, Callable[[int], tuple[int, ...]]] = {
    "causal": lambda length: (),
    "full": lambda length: (),
    "window": lambda length: (max(length // 4, 1), length // 8),
    "packed": lambda length: (
        (length // 3, length - length // 3) if length < 4 else (length // 3, 1, length - length // 3 - 1)
    ),
}


def _counts(text: str, numbers: str) -> tuple[int, ...]:
    parts = numbers.split(",")
    if not all(part.isdecimal() for part in parts):
        raise _bad_mask(text, f"{numbers!r} is not a list of counts")
    return tuple(map(int, parts))


def _bad_mask(text: str, why: str) -> SequenceParallelConfigError:
    return SequenceParallelConfigError(
        setting="mask", value=text, why=why, remedy="write for example causal+window:127 or causal+packed:100,28"
    )
