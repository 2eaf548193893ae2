"""Moving tokens from where they are sharded to where a stage wants them, in whatever pattern the model lays them out.

Tokens of another kind along a dim (class tokens, registers) are sharded where a dim is that they run along, and whole
on every rank otherwise; they move with the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import shard_ranges
from dsp_plugin.methods import dsp
from dsp_plugin.plans.pattern import Parts, Pattern, alternative


class Place(NamedTuple):
    """Where tokens are sharded.

    Attributes:
        dim: the sharded one.
        padded: whether a rank that has no entries of it holds one that is dropped again, since models cannot compute
            on empty tensors. Not inside attention that spans the ranks.
    """

    dim: str
    padded: bool = True


class TokenMoves:
    """Moves tokens of one forward pass.

    Args:
        sizes: of all token dims, over all ranks.
    """

    def __init__(self, sizes: Mapping[str, int], groups: SequenceParallelGroups) -> None:
        self._sizes, self._groups = dict(sizes), groups
        self._parts, self._rank = groups.sp.size, groups.sp.rank

    def own(self, dim: str) -> range:
        """This rank's entries of a sharded dim."""
        return shard_ranges(self._sizes[dim], self._parts)[self._rank]

    def move(self, x: Tensor, pattern: Pattern, source: Place | None, target: Place | None, setting: str) -> Tensor:
        """``x``, in the same pattern, sharded at ``target``; None is whole on every rank.

        Raises:
            SequenceParallelConfigError: ``x`` is not laid out as the pattern says.
        """
        sizes = pattern.solve(x.shape, self._local(source), setting)
        if self._parts == 1 or source == target:
            return x
        parts = pattern.take_apart(x, sizes)
        return pattern.put_together(
            Parts(
                self._move(parts.main, pattern.names, source, target),
                None if parts.before is None else self._move(parts.before, pattern.extra_dims, source, target),
                None if parts.behind is None else self._move(parts.behind, pattern.extra_dims, source, target),
            )
        )

    def cut(self, value: Tensor, text: str, place: Place, setting: str) -> Tensor:
        """This rank's part of a tensor that every rank holds whole.

        A dim of one entry where tokens have more is left as it is: it broadcasts.

        Raises:
            SequenceParallelConfigError: the tensor is not as its pattern says.
        """
        pattern = alternative(text, value.dim(), setting)
        if pattern is None:
            raise SequenceParallelConfigError(
                setting=setting,
                value=text,
                why=f"a tensor {tuple(value.shape)} has {value.dim()} dims",
                remedy="name every dim of the argument; give patterns for several numbers of dims separated by |",
            )
        along = next((dim for dim, group in enumerate(pattern.groups) if place.dim in group.names), None)
        if (
            self._parts == 1
            or along is None
            or (value.shape[along] == 1 and pattern.groups[along].names == (place.dim,))
        ):
            return value
        # Dims of one entry broadcast: their sizes are those of the tensor, not of the tokens.
        single = {
            group.names[0]
            for group, n in zip(pattern.groups, value.shape, strict=True)
            if n == 1 and len(group.names) == 1
        }
        known = {name: 1 if name in single else size for name, size in self._sizes.items()}
        sizes = pattern.solve(value.shape, known, setting)
        parts = pattern.take_apart(value, sizes)
        main = self._narrowed(parts.main, pattern.names.index(place.dim), place)
        before, behind = parts.before, parts.behind
        if place.dim in pattern.extra_names:
            dim = pattern.extra_dims.index(place.dim)
            before = None if before is None else self._narrowed(before, dim, place)
            behind = None if behind is None else self._narrowed(behind, dim, place)
        return pattern.put_together(Parts(main, before, behind))

    def _narrowed(self, value: Tensor, dim: int, place: Place) -> Tensor:
        own = self.own(place.dim)
        if not own and place.padded:
            return value.narrow(dim, 0, 1)
        return value.narrow(dim, own.start, len(own))

    def _local(self, place: Place | None) -> dict[str, int]:
        if place is None:
            return self._sizes
        return {**self._sizes, place.dim: max(len(self.own(place.dim)), int(place.padded))}

    def _move(self, x: Tensor, names: Sequence[str], source: Place | None, target: Place | None) -> Tensor:
        """One tensor with one dim a name; dims that it has not are whole."""
        source = source if source is not None and source.dim in names else None
        target = target if target is not None and target.dim in names else None
        before = None if source is None else names.index(source.dim)
        after = None if target is None else names.index(target.dim)
        if source is not None and before is not None and not self.own(source.dim):
            x = x.narrow(before, 0, 0)
        if before is None and after is not None:
            x = dsp.split(x, after, groups=self._groups)
        elif source is not None and before is not None and after is None:
            x = dsp.gather(x, before, length=self._sizes[source.dim], groups=self._groups)
        elif source is not None and before is not None and after is not None and before != after:
            x = dsp.switch(x, before, after, length=self._sizes[source.dim], groups=self._groups)
        if target is not None and after is not None and target.padded and not self.own(target.dim):
            x = torch.cat([x, _padding(x, after)], dim=after)
        return x


def _padding(x: Tensor, dim: int) -> Tensor:
    """One entry along ``dim`` that no norm divides by zero for: features that differ."""
    shape = [*x.shape]
    shape[dim] = 1
    return torch.linspace(-1.0, 1.0, shape[-1], device=x.device, dtype=x.dtype).expand(shape)
