"""Where some of the tokens of a tensor lie: one stretch, which is a view, or several, which are picked by index."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsp_plugin.integers import kept_on_device

Column = NDArray[np.int64]
# More views than this cost more than to read an index.
_FEW = 4


class Places:
    """Tokens by where they lie, in order. Compared by identity, so that what is kept of them on a device is found.

    Args:
        starts, stops: int64 ``[stretches]``, ascending and neither empty nor overlapping; neighbours are joined.
    """

    def __init__(self, starts: Column, stops: Column) -> None:
        apart = np.concatenate([[True], starts[1:] != stops[:-1], [True]])
        if not apart[1:-1].all():
            starts, stops = starts[apart[:-1]], stops[apart[1:]]
        self.starts, self.stops = starts, stops

    @classmethod
    def of(cls, lengths: Column, chosen: NDArray[np.bool_]) -> Places:
        """Of pieces of these lengths, one behind the other, the chosen ones."""
        if chosen.all():
            return cls.whole(int(lengths.sum()))
        chosen = chosen & (lengths > 0)
        if not chosen.any():
            return cls.whole(0)
        ends = np.cumsum(lengths)
        return cls((ends - lengths)[chosen], ends[chosen])

    @classmethod
    def whole(cls, tokens: int) -> Places:
        """All of so many tokens."""
        ends = np.array([tokens] if tokens else [], dtype=np.int64)
        return cls(np.zeros_like(ends), ends)

    @classmethod
    def stretch_of(cls, stretch: slice) -> Places:
        """The tokens of a slice that is not empty."""
        return cls(np.array([stretch.start]), np.array([stretch.stop]))

    def __len__(self) -> int:
        """How many stretches they are."""
        return len(self.starts)

    def __iter__(self) -> Iterator[slice]:
        return map(slice, self.starts.tolist(), self.stops.tolist())

    @cached_property
    def count(self) -> int:
        """How many tokens they are."""
        return int((self.stops - self.starts).sum())

    @property
    def stretch(self) -> slice | None:
        """Where they lie, if it is one stretch."""
        return next(iter(self)) if len(self) == 1 else None

    def covers(self, tokens: int) -> bool:
        """Whether they are all of so many tokens."""
        return self.count == tokens

    def index(self) -> Column:
        """Of every token, where it lies: int64 ``[count]``."""
        lengths = self.stops - self.starts
        ends = np.cumsum(lengths)
        return np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.starts - (ends - lengths), lengths)

    def pick(self, x: Tensor, dim: int = 1) -> Tensor:
        """These tokens of ``x``: a view where they are one stretch, otherwise copied."""
        if not len(self):
            return x.narrow(dim, 0, 0)
        if len(self) == 1:
            return x.narrow(dim, int(self.starts[0]), self.count)
        return x.index_select(dim, self.on(x.device))

    def views(self, x: Tensor, dim: int = 1) -> list[Tensor] | None:
        """These tokens of ``x`` stretch by stretch, where they are few."""
        if len(self) > _FEW:
            return None
        return [x.narrow(dim, run.start, run.stop - run.start) for run in self]

    def put_(self, x: Tensor, tokens: Tensor) -> None:
        """Write these tokens of ``x`` ``[B, n, ...]``."""
        views = self.views(x)
        if views is None:
            x.index_copy_(1, self.on(x.device), tokens.to(x.dtype))
            return
        for view, part in zip(views, self._split(tokens), strict=True):
            view.copy_(part)

    def add_(self, x: Tensor, tokens: Tensor) -> None:
        """Add to these tokens of ``x`` ``[B, n, ...]``."""
        views = self.views(x)
        if views is None:
            x.index_add_(1, self.on(x.device), tokens.to(x.dtype))
            return
        for view, part in zip(views, self._split(tokens), strict=True):
            view.add_(part)

    def on(self, device: torch.device) -> Tensor:
        """`index` on a device, copied there once."""
        return _on_device(self, device=device)[0]

    def _split(self, tokens: Tensor) -> Sequence[Tensor]:
        return tokens.split((self.stops - self.starts).tolist(), 1) if len(self) else ()


def _index(places: Places) -> tuple[Column]:
    return (places.index(),)


# A ring has a few for every hop, and each is asked for by every layer.
_on_device = kept_on_device(_index, most=512)
