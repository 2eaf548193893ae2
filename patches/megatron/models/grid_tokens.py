"""Which tokens of a grid each rank of a model holds, under context parallelism and Megatron's ``--sequence-parallel``.

Context-parallel ranks share one dim of the grid and, under DSP, switch it; a sequence is a grid of one dim. With
``--sequence-parallel`` the tensor-parallel ranks that hold the same tokens share them between layers, always by the
first dim: context-parallel rank i has a run of it, and its tensor-parallel rank j the j-th part of that run. After a
switch to another dim, tensor-parallel rank j has its parts of all runs, so a switch goes between the same ranks as
without, and each moves its own part only. What Megatron gathers in a layer is then all of the first dim, in the order
`Tokens.gathered`; attention does not mind the order, as long as rotary tables follow it.

Shape suffixes: G the dims of the grid, B batch, C features; N is this rank's tokens, the first dim outermost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.integers import kept_on_device
from dsp_plugin.layout import Layout, shard_ranges
from dsp_plugin.methods import dsp
from dsp_plugin.patches.megatron.parallel_state import registered_state
from dsp_plugin.planner.moves import Activation
from dsp_plugin.planner.stages import StageSpec, plan_stages


def sharded_dims(
    sizes: Mapping[str, int], blocks: Sequence[str], *, features: int, element_size: int, size: int
) -> tuple[str, ...]:
    """The dim to shard in every block of a model that computes along one dim at a time, as the planner chooses it.

    Args:
        sizes: of the whole grid, by dim.
        blocks: the dim that each block computes along, of all pipeline stages in order.
        features: elements of a token.
        element_size: bytes of one.
        size: context-parallel ranks.
    """
    stages = [StageSpec(f"block {place} along {dim}", (dim,)) for place, dim in enumerate(blocks)]
    plan = plan_stages(Activation({**sizes, "b": 1}, features, element_size), stages, size, gather=False)
    return tuple(row.sharded for row in plan.rows)


@dataclass(frozen=True)
class Tokens:
    """The tokens of a grid, on one rank.

    Attributes:
        sizes: of the whole grid by dim, outermost first.
        groups: the dsp axis is used, which spans all context-parallel ranks.
        parts: tensor-parallel ranks that share the tokens between layers; 1 without ``--sequence-parallel``.
        part: which of them this rank is.
        names: of dims, for errors; by default what they are called in `sizes`.
    """

    sizes: Mapping[str, int]
    groups: SequenceParallelGroups
    parts: int = 1
    part: int = 0
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The dim that tensor-parallel ranks share."""
        return next(iter(self.sizes))

    def check(self, dims: Iterable[str]) -> None:
        """Refuses a grid that would leave a rank without tokens, or ranks with parts that are not equal.

        Args:
            dims: those that context-parallel ranks come to share.

        Raises:
            SequenceParallelConfigError: the sizes do not fit the ranks.
        """
        name, length = self.names.get(self.first, self.first), self.sizes[self.first]
        if length % self.parts:
            raise SequenceParallelConfigError(
                setting=name,
                value=length,
                why=f"with --sequence-parallel {self.parts} tensor-parallel ranks hold equal parts of the {name}, and "
                f"{length} / {self.parts} leaves {length % self.parts}",
                remedy=f"train on a multiple of {self.parts} {name}, or without --sequence-parallel",
            )
        size = self.groups.dsp.size
        for dim in sorted(set(dims), key=list(self.sizes).index):
            name, held = self.names.get(dim, dim), self._length(dim)
            shared = f" over {self.parts} tensor-parallel ranks" * (dim == self.first and self.parts > 1)
            if held < size:
                raise SequenceParallelConfigError(
                    setting=name,
                    value=self.sizes[dim],
                    why=f"there are {held} {name}{shared} for {size} context-parallel ranks, and one would have none",
                    remedy=f"lower --context-parallel-size to {held} or less",
                )

    def _length(self, dim: str) -> int:
        """Entries of a dim that context-parallel ranks share."""
        return self.sizes[dim] // self.parts if dim == self.first else self.sizes[dim]

    @cached_property
    def _own_runs(self) -> list[range]:
        """Of each context-parallel rank, the entries of the first dim in this part."""
        runs = shard_ranges(self._length(self.first), self.groups.dsp.size)
        return [
            range(run.start * self.parts + len(run) * self.part, run.start * self.parts + len(run) * (self.part + 1))
            for run in runs
        ]

    def own(self, dim: str, sharded: str) -> list[int]:
        """The entries along a dim of this rank's tokens, in their order, while ``sharded`` is."""
        rank = self.groups.dsp.rank
        if dim == self.first:
            return list(self._own_runs[rank] if sharded == dim else chain(*self._own_runs))
        return list(
            shard_ranges(self.sizes[dim], self.groups.dsp.size)[rank] if sharded == dim else range(self.sizes[dim])
        )

    def gathered(self, dim: str, sharded: str) -> list[int]:
        """The same of the tokens of all parts, in the order in which Megatron gathers them."""
        if dim != self.first:
            return self.own(dim, sharded)
        others = (replace(self, part=part) for part in range(self.parts))
        return list(chain.from_iterable(tokens.own(dim, sharded) for tokens in others))

    def layout(self) -> Layout:
        """Of a sequence, where context-parallel ranks have its tokens when all parts are gathered."""
        assert len(self.sizes) == 1, self.sizes
        runs = shard_ranges(self._length(self.first), self.groups.dsp.size)
        return Layout.of_sizes([len(run) * self.parts for run in runs])

    def count(self, sharded: str) -> int:
        """N: this rank's tokens."""
        return prod(len(self.own(dim, sharded)) for dim in self.sizes)

    def cut(self, whole_BGC: Tensor, sharded: str) -> Tensor:
        """This rank's tokens ``[N, B, ...]`` of a whole grid ``[B, G, ...]``, which needs no gradient."""
        local = whole_BGC
        for place, dim in enumerate(self.sizes, 1):
            local = local.index_select(place, on_device(self.own(dim, sharded), local.device))
        return local.flatten(1, len(self.sizes)).transpose(0, 1).contiguous()

    def switch(self, x_NBC: Tensor, source: str, target: str) -> Tensor:
        """The tokens of this rank after the sharded dim has moved; a collective of the context-parallel ranks."""
        if source == target or self.groups.dsp.size == 1:
            return x_NBC
        dims = list(self.sizes)
        x_GBC = x_NBC.unflatten(0, [len(self.own(dim, source)) for dim in dims])
        moved = dsp.switch(
            x_GBC, dims.index(source), dims.index(target), length=self._length(source), groups=self.groups
        )
        return moved.flatten(0, len(dims) - 1)


def on_device(entries: list[int], device: torch.device) -> Tensor:
    """Entries of a dim, int64, copied to a device once for all layers and batches of a shape."""
    return _kept(tuple(entries), device=device)[0]


@kept_on_device
def _kept(entries: tuple[int, ...]) -> tuple[NDArray[np.int64], ...]:
    return (np.array(entries, dtype=np.int64),)


def local_tokens(config: Any, sizes: Mapping[str, int], names: Mapping[str, str]) -> Tokens:
    """This rank's place in a grid; for the arguments see `Tokens`."""
    from megatron.core import parallel_state

    state = registered_state()
    alone = config.context_parallel_size == 1 or state is None or state.groups is None
    groups = SequenceParallelGroups.single() if alone else state.groups
    assert groups is not None
    parts, part = 1, 0
    if config.sequence_parallel:
        parts = parallel_state.get_tensor_model_parallel_world_size()
        part = parallel_state.get_tensor_model_parallel_rank()
    return Tokens(sizes, groups, parts, part, names)
