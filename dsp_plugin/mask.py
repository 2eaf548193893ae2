"""Which keys a query may see, in global positions, so that one mask means the same under every sharding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.integers import integer, integers

_BORDERS = "pass (0, end of document 1, ..., sequence length)"

Band = tuple[int | None, int | None]


@dataclass(frozen=True, eq=False)
class MaskSpec:
    """A structured attention mask over global positions.

    The query at position ``i`` sees the key at position ``j`` iff all hold:

    * ``j <= i`` when ``causal``;
    * ``-left <= j - i <= right`` for ``window = (left, right)``, ``None`` meaning unbounded on that side
      (FlashAttention's convention, with ``None`` for its ``-1``);
    * ``i`` and ``j`` lie in the same document, ``cu_seqlens = (0, ..., L)`` being the document borders. All batch
      rows share them.

    Raises:
        SequenceParallelConfigError: ``causal`` is no truth value, or the window or the document borders are malformed.
    """

    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    cu_seqlens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.causal, bool):
            raise SequenceParallelConfigError(
                setting="causal",
                value=self.causal,
                why=f"it is True or False, not {type(self.causal).__name__}",
                remedy="pass one of them",
            )
        if self.window is not None:
            object.__setattr__(self, "window", _window(self.window))
        if self.cu_seqlens is not None:
            borders = integers(self.cu_seqlens, "cu_seqlens", remedy=_BORDERS)
            object.__setattr__(self, "cu_seqlens", borders)
            if len(borders) < 2 or borders[0] != 0 or list(borders) != sorted(borders):
                raise SequenceParallelConfigError(
                    setting="cu_seqlens",
                    value=borders,
                    why="document borders start at 0, never decrease, and end at the sequence length",
                    remedy=_BORDERS,
                )

    def __eq__(self, other: object) -> bool:
        # Every layer asks with the same one, whose borders need not be compared.
        if self is other:
            return True
        return self._fields == other._fields if isinstance(other, MaskSpec) else NotImplemented

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        # What is worked out stays behind: the hash of None differs between processes.
        return type(self), self._fields

    @property
    def _fields(self) -> tuple[Any, ...]:
        return self.causal, self.window, self.cu_seqlens

    @cached_property
    def _hash(self) -> int:
        return hash(self._fields)

    def band(self) -> Band:
        """``(left, right)`` such that a key is in reach iff ``-left <= j - i <= right``; causal is ``right = 0``."""
        left, right = self.window if self.window is not None else (None, None)
        if self.causal:
            right = 0
        return left, right

    def documents(self, length: int) -> tuple[range, ...]:
        """The global positions of each document of a sequence of ``length`` tokens; one range when not packed.

        Raises:
            SequenceParallelConfigError: the last border is not ``length``.
        """
        if self.cu_seqlens is None:
            return (range(length),)
        if self.cu_seqlens[-1] != length:
            raise SequenceParallelConfigError(
                setting="cu_seqlens",
                value=self.cu_seqlens,
                why=f"the last border is {self.cu_seqlens[-1]} but the sequence has {length} tokens",
                remedy="give borders in global positions of the whole sequence, not of a shard",
            )
        return self._ranges

    @cached_property
    def _ranges(self) -> tuple[range, ...]:
        return tuple(range(a, b) for a, b in pairwise(self.cu_seqlens or ()) if b > a)

    def pairs(self, length: int) -> int:
        """How many (query, key) pairs see each other in a sequence of ``length`` tokens."""
        left, right = self.band()
        total = 0
        for document in self.documents(length):
            n = len(document)
            # Of the n * n pairs, those out of reach on either side are two triangles.
            behind = max(n - 1 - left, 0) if left is not None else 0
            ahead = max(n - 1 - right, 0) if right is not None else 0
            total += n * n - behind * (behind + 1) // 2 - ahead * (ahead + 1) // 2
        return total

    def describe(self) -> str:
        """A short name for tables: ``causal``, ``full``, ``causal+window(7, 0)+packed(3)``."""
        parts = ["causal" if self.causal else "full"]
        if self.window is not None:
            parts.append(f"window{self.window}")
        if self.cu_seqlens is not None:
            parts.append(f"packed({len(self.cu_seqlens) - 1})")
        return "+".join(parts)


def document_starts(cu_seqlens: Iterable[int] | Tensor | None, length: int) -> tuple[int, ...]:
    """Where documents start but the first, in a sequence of ``length`` tokens; empty ones left out.

    Raises:
        SequenceParallelConfigError: the borders are malformed, or the last is not ``length``.
    """
    if cu_seqlens is None:
        return ()
    documents = MaskSpec(cu_seqlens=integers(cu_seqlens, "cu_seqlens", remedy=_BORDERS)).documents(length)
    return tuple(document.start for document in documents[1:])


def _window(window: object) -> tuple[int | None, int | None]:
    try:
        left, right = window if isinstance(window, tuple | list) else ()
        return _side(left), _side(right)
    except ValueError:
        raise SequenceParallelConfigError(
            setting="window",
            value=window,
            why="a window is (left, right), each a count of tokens >= 0, or None (not -1) for unbounded",
            remedy="write (1023, 0) for a causal window over 1024 tokens",
        ) from None


def _side(side: object) -> int | None:
    return None if side is None else integer(side, "window")
