"""The placement of one sequence on ranks: contiguous, zigzag and striped, for any length and size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.integers import MOST, integer, integers, kept_on_device
from dsp_plugin.layout.runs import Column, Runs, folded, shard_sizes
from dsp_plugin.layout.whole import Dealt, deal

LayoutKind = Literal["contiguous", "zigzag", "striped"]
LAYOUTS: tuple[LayoutKind, ...] = get_args(LayoutKind)
MOST_RANKS = 2**20
"""More than any machine has: a larger count is a mistake, and what lists the ranks would never end."""
TILE = 128
"""Queries that attention kernels compute at once; of a shorter run they compute as many."""


@dataclass(frozen=True, eq=False)
class Layout:
    """The placement of one sequence of ``length`` tokens on ``size`` ranks.

    * ``contiguous``: rank r holds the r-th of P runs.
    * ``zigzag``: of 2P runs rank r holds runs r and 2P-1-r, which balances causal work; Megatron-core's order.
    * ``striped``: rank r holds tokens r, r+P, r+2P, ...

    Lengths need not divide; runs differ by at most one token. ``explicit_sizes`` overrides the sizes of contiguous runs
    (tokens that are the product of a sharded dim and a whole one come in such sizes).

    ``documents``, borders ``(0, ..., length)`` as in `MaskSpec.cu_seqlens`, makes zigzag cut every document by itself:
    rank r holds runs r and 2P-1-r of each, so causal work is balanced whatever the lengths. Which runs are a token
    longer rotates from document to document, so that tokens in all still differ by at most one between ranks; the
    pairs of a causal document of l tokens differ by less than 2l. With one document it is plain zigzag.

    ``whole_below`` leaves documents of fewer tokens whole on one rank, where balance allows: their keys stay there.
    Tokens in all still differ by at most one between ranks, for which at most P - 1 times a document is cut in two.
    What queries see, in causal and in full attention, is on no rank more than a twentieth above the mean; where it
    would be, only those of half as many tokens, and so on, stay whole, and in the end none.

    Raises:
        SequenceParallelConfigError: unknown kind, a count that is no integer, a size below 1 or beyond
            `MOST_RANKS`, or sizes or documents that do not add up.
    """

    kind: LayoutKind
    length: int
    size: int
    explicit_sizes: tuple[int, ...] | None = None
    documents: tuple[int, ...] | None = None
    whole_below: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in LAYOUTS:
            raise SequenceParallelConfigError(
                setting="layout", value=self.kind, why=f"known layouts are {', '.join(LAYOUTS)}", remedy="pick one"
            )
        for name in ("length", "size"):
            count = integer(getattr(self, name), f"layout {name}", least=-MOST, remedy="check how it was read")
            object.__setattr__(self, name, count)
        if not 1 <= self.size <= MOST_RANKS or self.length < 0:
            raise SequenceParallelConfigError(
                setting="layout",
                value=f"{self.kind}(length={self.length}, size={self.size})",
                why=f"a layout needs length >= 0 and size >= 1, and no more than {MOST_RANKS:,} ranks",
                remedy="check how the sequence length was read",
            )
        if self.explicit_sizes is not None:
            given = integers(self.explicit_sizes, "layout explicit_sizes", remedy="count the tokens of each rank")
            object.__setattr__(self, "explicit_sizes", given)
        sizes = self.explicit_sizes
        if sizes is not None and (self.kind != "contiguous" or len(sizes) != self.size or sum(sizes) != self.length):
            raise SequenceParallelConfigError(
                setting="layout",
                value=f"{self.kind}(length={self.length}, size={self.size}, explicit_sizes={sizes})",
                why=f"explicit sizes are those of {self.size} contiguous runs of {self.length} tokens in all; these "
                f"are {len(sizes)} with {sum(sizes)} tokens",
                remedy="use Layout.of_sizes",
            )
        self._check_documents()

    def _check_documents(self) -> None:
        below = integer(self.whole_below, "whole_below", remedy="give a number of tokens, 0 to cut every document")
        object.__setattr__(self, "whole_below", below)
        if self.documents is None:
            return
        borders = integers(self.documents, "documents", remedy="pass (0, end of document 1, ..., sequence length)")
        object.__setattr__(self, "documents", borders)
        if self.kind != "zigzag":
            raise SequenceParallelConfigError(
                setting="documents",
                value=borders,
                why=f"only zigzag cuts every document by itself, and the layout is {self.kind}",
                remedy="choose layout zigzag, or leave documents to the mask",
            )
        if borders[:1] != (0,) or borders[-1] != self.length or list(borders) != sorted(borders):
            raise SequenceParallelConfigError(
                setting="documents",
                value=borders,
                why=f"document borders start at 0, never decrease, and end at the sequence length, {self.length}",
                remedy="pass (0, end of document 1, ..., sequence length)",
            )

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> Layout:
        """Contiguous runs of the given sizes."""
        return cls("contiguous", sum(sizes), len(sizes), tuple(sizes))

    @classmethod
    def of_documents(cls, kind: LayoutKind, length: int, size: int, documents: tuple[int, ...] | None) -> Layout:
        """The placement of a packed sequence; without documents, or in another order than zigzag, of a plain one.

        Documents live whole on one rank where they have fewer than ``2 P TILE`` tokens: runs of such a document would
        be shorter than a tile, which costs a kernel as much as a whole one.
        """
        if kind != "zigzag" or documents is None:
            return cls(kind, length, size)
        return cls(kind, length, size, documents=documents, whole_below=2 * size * TILE)

    def __eq__(self, other: object) -> bool:
        # Every layer asks with the same one, whose borders need not be compared.
        if self is other:
            return True
        return self._fields == other._fields if isinstance(other, Layout) else NotImplemented

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        # What is worked out stays behind, hashes above all: those of text differ between processes.
        return type(self), self._fields

    @cached_property
    def _fields(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))

    @cached_property
    def _hash(self) -> int:
        return hash(self._fields)

    @cached_property
    def _borders(self) -> Column:
        return np.array((0, self.length) if self.documents is None else self.documents, dtype=np.int64)

    @cached_property
    def _dealt(self) -> Dealt:
        """Of zigzag, who holds what of which document."""
        lengths = np.diff(self._borders)
        starts, lengths = self._borders[:-1][lengths > 0], lengths[lengths > 0]
        return deal(starts, lengths, self.size, self.whole_below)

    @cached_property
    def _runs(self) -> dict[int, Runs]:
        return {}

    @cached_property
    def _spans(self) -> dict[int, tuple[range, ...]]:
        return {}

    def spans(self, rank: int) -> tuple[range, ...]:
        """Global positions of the tokens of ``rank``, in local order; empty runs left out."""
        if rank not in self._spans:
            self._spans[rank] = self.runs(rank).ranges()
        return self._spans[rank]

    def runs(self, rank: int) -> Runs:
        """The same as columns, of which thousands cost no more than a few. Not to be written to."""
        if rank not in self._runs:
            self._runs[rank] = self._runs_of(range(self.size)[rank])
        return self._runs[rank]

    def _runs_of(self, rank: int) -> Runs:
        if self.kind == "striped":
            start = np.array([rank] if rank < self.length else [], dtype=np.int64)
            return Runs(start, np.full_like(start, self.size), np.full_like(start, self.sizes[rank]))
        if self.kind == "contiguous":
            stop = np.array([self._stops[rank]], dtype=np.int64)
            return Runs.of(stop - self.sizes[rank], stop)
        cut, pieces = self._dealt
        both, mine = [rank, 2 * self.size - 1 - rank], pieces.rank == rank
        starts = np.concatenate([cut[:, both].ravel(), pieces.starts[mine]])
        stops = np.concatenate([cut[:, [run + 1 for run in both]].ravel(), pieces.stops[mine]])
        order = np.argsort(starts, kind="stable")
        return Runs.of(starts[order], stops[order])

    @cached_property
    def _stops(self) -> tuple[int, ...]:
        return tuple(accumulate(self.sizes))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Local token counts by rank; they sum to ``length``."""
        if self.explicit_sizes is not None:
            return self.explicit_sizes
        if self.kind != "zigzag":
            return shard_sizes(self.length, self.size)
        if self.documents is None:
            runs = shard_sizes(self.length, 2 * self.size)
            return tuple(runs[rank] + runs[-1 - rank] for rank in range(self.size))
        cut, pieces = self._dealt
        tokens = folded(np.diff(cut, axis=1).sum(0))
        np.add.at(tokens, pieces.rank, pieces.stops - pieces.starts)
        return tuple(tokens.tolist())

    def position_ids(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """Global positions of the tokens of ``rank``: int64 ``[n]``."""
        if self.documents is not None:
            device = torch.get_default_device() if device is None else torch.device(device)
            # A copy, which the caller may write to.
            return _positions(self, rank, device=device)[0].clone()
        runs = [torch.arange(run.start, run.stop, run.step, device=device) for run in self.spans(rank)]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.int64, device=device)

    def shard(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """The part of ``x`` (global along ``dim``) that ``rank`` holds; a view when it is one run.

        Raises:
            SequenceParallelConfigError: ``x`` does not have ``length`` entries along ``dim``.
        """
        if x.shape[dim] != self.length:
            raise SequenceParallelConfigError(
                setting="sequence length",
                value=x.shape[dim],
                why=f"dim {dim} of a tensor {tuple(x.shape)} should hold the whole sequence of {self.length} tokens",
                remedy="pass unsharded tensors, and name the sequence dim correctly",
            )
        if self.documents is not None:
            return x.index_select(dim, _positions(self, rank, device=x.device)[0])
        runs = [run_of(x, dim, run) for run in self.spans(rank)]
        if not runs:
            return x.narrow(dim, 0, 0)
        return runs[0] if len(runs) == 1 else torch.cat(runs, dim)

    def unshard(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """The global tensor from the shards of all ranks, in rank order."""
        if self.kind == "contiguous":
            return torch.cat(list(shards), dim)
        if self.documents is not None:
            return torch.cat(list(shards), dim).index_select(dim, _places(self, device=shards[0].device)[0])
        shape = list(shards[0].shape)
        shape[dim] = self.length
        out = shards[0].new_empty(shape)
        for rank, shard in enumerate(shards):
            offset = 0
            for run in self.spans(rank):
                run_of(out, dim, run).copy_(shard.narrow(dim, offset, len(run)))
                offset += len(run)
        return out


@kept_on_device
def _positions(layout: Layout, rank: int) -> tuple[Column]:
    """Of the tokens of a rank, in local order."""
    return (layout.runs(rank).positions(),)


@kept_on_device
def _places(layout: Layout) -> tuple[Column]:
    """Of every token, where it lies in the shards put one after the other."""
    places = np.empty(layout.length, dtype=np.int64)
    places[np.concatenate([layout.runs(rank).positions() for rank in range(layout.size)])] = np.arange(layout.length)
    return (places,)


def run_of(x: Tensor, dim: int, run: range) -> Tensor:
    """The entries of ``x`` at the positions ``run`` along ``dim``, as a view."""
    index: list[slice] = [slice(None)] * x.dim()
    index[dim] = slice(run.start, run.stop, run.step)
    return x[tuple(index)]
