"""The rank grid, and the process groups cut from it by name: sp, ulysses, ring, dsp, lasp, dp.

A sequence group of P ranks is a ``ring x ulysses`` grid, P = U * R. DSP and LASP use the whole sequence group, under
names of their own so that a framework can register, and the ledger can tell, who sent what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol, Self
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from dsp_plugin.comm.axis import Axis, timeout_of

# The groups that were made inside a world: what builds the same grid again, such as a second engine, shares them, for
# each has communicators, and buffers on every device, of its own.
_made: WeakKeyDictionary[ProcessGroup, dict[tuple[int, ...], ProcessGroup]] = WeakKeyDictionary()


class Grid(Protocol):
    """What a configuration says of the ranks that share a sequence; `SequenceParallelConfig` is one."""

    @property
    def size(self) -> int: ...

    @property
    def ulysses_size(self) -> int: ...

    @property
    def ring_size(self) -> int: ...

    @property
    def ulysses_order(self) -> Literal["adjacent", "strided"]: ...

    @property
    def debug(self) -> bool: ...

    def check_world(self, world_size: int, **other_sizes: int) -> int:
        """The data-parallel size that is left; raises where the sizes do not fit the world."""


@dataclass(frozen=True)
class SequenceParallelGroups:
    """Every axis a method may communicate on, plus the data-parallel replicas of this rank's sequence shard."""

    sp: Axis
    ulysses: Axis
    ring: Axis
    dsp: Axis
    lasp: Axis
    dp: Axis

    @classmethod
    def build(cls, config: Grid, data_rows: Sequence[Sequence[int]] | None = None, **other_sizes: int) -> Self:
        """Cut data-parallel ranks into ``dp x ring x ulysses``, Ulysses ranks adjacent unless set otherwise.

        Every rank of the world must call this; the process groups are created in the same order everywhere.

        Args:
            data_rows: the global ranks of every data-parallel group of the framework, the same on all ranks, each rank
                of the world in one of them; one row of the whole world when None.
            other_sizes: the parallel sizes that made more than one row of it, by name, for errors.

        Raises:
            SequenceParallelConfigError: the sizes do not divide the world.
        """
        if not dist.is_initialized():
            config.check_world(1, **other_sizes)
            return cls.single()
        world_size = dist.get_world_size()
        config.check_world(world_size, **other_sizes)
        rows = torch.arange(world_size).unsqueeze(0) if data_rows is None else torch.tensor(data_rows)
        ulysses_size, ring_size = config.ulysses_size, config.ring_size
        if config.ulysses_order == "adjacent":
            grid = rows.view(-1, ring_size, ulysses_size)
        else:
            grid = rows.view(-1, ulysses_size, ring_size).transpose(1, 2)
        sp = _axis("sp", rows.view(-1, config.size))
        # An axis that spans the whole sequence group shares its process group: one communicator, not two.
        return cls.from_axes(
            sp=sp,
            ulysses=sp if ring_size == 1 else _axis("ulysses", grid.flatten(0, 1)),
            ring=sp if ulysses_size == 1 < ring_size else _axis("ring", grid.transpose(1, 2).flatten(0, 1)),
            dp=_axis_to_ask_for("dp", rows.view(len(rows), -1, config.size).transpose(1, 2).flatten(0, 1)),
            debug=config.debug,
        )

    @classmethod
    def from_axes(cls, *, sp: Axis, ulysses: Axis, ring: Axis, dp: Axis, debug: bool = False) -> Self:
        """Groups over axes that a framework already made, such as Megatron-core's context-parallel groups.

        ``ulysses`` or ``ring`` may be ``sp`` itself, where the other has one rank.
        """
        here = sp.ranks[sp.rank]
        assert ulysses.size * ring.size == sp.size, (ulysses, ring, sp)
        assert here in ulysses.ranks
        assert here in ring.ranks
        assert here in dp.ranks
        axes = {"sp": sp, "ulysses": ulysses, "ring": ring, "dsp": sp, "lasp": sp, "dp": dp}
        return cls(**{name: axis.renamed(name).debugged(debug) for name, axis in axes.items()})

    @classmethod
    def of_sequence_group(cls, group: ProcessGroup, dp: Axis | None = None, debug: bool = False) -> Self:
        """Groups where the whole of an existing sequence group is the Ulysses axis."""
        sp = Axis.of_group("sp", group)
        here = sp.ranks[sp.rank]
        dp = dp or Axis.alone("dp", here)
        return cls.from_axes(sp=sp, ulysses=sp, ring=Axis.alone("ring", here), dp=dp, debug=debug)

    @classmethod
    def single(cls) -> Self:
        """The groups of an unsharded run: every axis has one rank, and nothing is ever sent."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        alone = Axis.alone("sp", rank)
        return cls.from_axes(sp=alone, ulysses=alone, ring=alone, dp=alone)

    def __iter__(self) -> Iterator[Axis]:
        return iter((self.sp, self.ulysses, self.ring, self.dsp, self.lasp, self.dp))


def _axis(name: str, rows: torch.Tensor) -> Axis:
    """The axis of this rank among ``rows``, each row the global ranks of one group."""
    mine = _row_of_this_rank(name, rows)
    return Axis(name, _group_of(rows, mine), mine.index(dist.get_rank()), len(mine), mine)


def _axis_to_ask_for(name: str, rows: torch.Tensor) -> Axis:
    """`_axis` whose groups are made once somebody communicates on it: gradients are averaged by the frameworks."""
    mine = _row_of_this_rank(name, rows)
    made: ProcessGroup | Callable[[], ProcessGroup] | None = None
    if len(mine) == dist.get_world_size() > 1:
        made = dist.distributed_c10d._get_default_group()
    elif len(mine) > 1:
        made = partial(_group_of, rows, mine)
    return Axis(name, made, mine.index(dist.get_rank()), len(mine), mine)


def _row_of_this_rank(name: str, rows: torch.Tensor) -> tuple[int, ...]:
    here = dist.get_rank()
    mine = next((row for row in rows.tolist() if here in row), None)
    assert mine is not None, f"rank {here} is in no {name} group"
    return tuple(mine)


def _group_of(rows: torch.Tensor, mine: tuple[int, ...]) -> Any:
    """The process group of one of the rows, of which all are made, in one order; None for a row of one rank."""
    made = {tuple(row): _group(tuple(row)) for row in rows.tolist() if len(row) > 1}
    return made.get(mine)


def _group(ranks: tuple[int, ...]) -> ProcessGroup:
    """The process group of some ranks, which may be without this one; every rank of the world calls it."""
    world = dist.distributed_c10d._get_default_group()
    made = _made.setdefault(world, {})
    if ranks not in made:
        # Else the timeout is torch's ten or thirty minutes, whatever the script has set for the world.
        made[ranks] = dist.new_group(list(ranks), timeout=timeout_of(world))
    return made[ranks]
