"""Ways of tensors through an all-to-all: which entries of which dim come from and go to which rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dsp_plugin.layout import shard_ranges

Runs = tuple[range, ...]


@dataclass(frozen=True)
class Route:
    """How one tensor goes through an all-to-all: scattered along one dim, gathered along another.

    What is worked out from routes is kept by them: who makes the same ones again and again keeps them.

    Attributes:
        scatter_dim: whole before, cut after.
        gather_dim: cut before, whole after.
        scatter: for each destination the entries of ``scatter_dim`` that it gets. They may overlap: a key/value head
            that two ranks need goes to both, and its gradients are added up.
        gather: for each source the entries of ``gather_dim`` that its local ones are, in local order.
    """

    scatter_dim: int
    gather_dim: int
    scatter: tuple[Runs, ...]
    gather: tuple[Runs, ...]

    @classmethod
    def even(cls, scatter_dim: int, gather_dim: int, scatter_length: int, gather_length: int, parts: int) -> Route:
        """The route that cuts both dims into ``parts`` contiguous runs whose sizes differ by at most one."""
        return cls(
            scatter_dim,
            gather_dim,
            tuple((run,) for run in shard_ranges(scatter_length, parts)),
            tuple((run,) for run in shard_ranges(gather_length, parts)),
        )

    def inverse(self) -> Route:
        """The route back, which is also the route of the gradient."""
        return self._inverse

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _inverse(self) -> Route:
        back = Route(self.gather_dim, self.scatter_dim, self.gather, self.scatter)
        back.__dict__["_inverse"] = self
        return back

    @cached_property
    def _hash(self) -> int:
        # Of thousands of documents there are tens of thousands of runs.
        return hash((self.scatter_dim, self.gather_dim, self.scatter, self.gather))


def entries(runs: Runs) -> NDArray[np.int64]:
    """Of a dim, one by one: ``[sum of lengths]``."""
    arrays = [np.arange(run.start, run.stop, run.step, dtype=np.int64) for run in runs]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)


def length_of(runs_by_rank: Sequence[Runs]) -> int:
    """Of the dim that the runs, which may overlap, cover."""
    return max((run[-1] + 1 for runs in runs_by_rank for run in runs if len(run)), default=0)


def consecutive(runs_by_rank: Sequence[Runs]) -> bool:
    """Whether the runs, rank by rank, go up from 0 without gaps."""
    runs = [run for runs in runs_by_rank for run in runs if len(run)]
    starts = [run.start for run in runs]
    return starts == [0, *(run.stop for run in runs[:-1])][: len(runs)] and all(run.step == 1 for run in runs)
