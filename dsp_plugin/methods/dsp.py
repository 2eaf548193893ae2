"""DSP: shard the dim that the current stage does not compute along, and switch it between stages (arXiv 2403.10266).

A switch is one all-to-all of the activation. It never looks inside attention, so it serves any module.
"""

from __future__ import annotations

from math import prod

from torch import Tensor

from dsp_plugin.comm import collectives
from dsp_plugin.comm.switching import PendingSwitch, Turn
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import Layout, shard_sizes
from dsp_plugin.methods.method import Method, WireBytes, Workload


def switch(x: Tensor, from_dim: int, to_dim: int, *, length: int, groups: SequenceParallelGroups) -> Tensor:
    """Move the sharding of ``x`` from one dim to another: one all-to-all, by exact sizes, nothing padded.

    A contiguous ``x`` is copied once, packed or unpacked. One in another order is brought in order first where
    ``to_dim`` is in front of ``from_dim``, which is a second copy.

    Args:
        x: local along ``from_dim``, whole along ``to_dim``; any number of dims.
        from_dim: the dim that is sharded now.
        to_dim: the dim to shard.
        length: size of ``from_dim`` over all ranks.
        groups: the dsp axis is used.

    Returns:
        Whole along ``from_dim``, local along ``to_dim``. Contiguous where the dims in front of both have one entry
        each; else dense, with ``from_dim`` outermost in memory.

    Raises:
        SequenceParallelConfigError: the dims are the same, or ``x`` is not this rank's shard of ``length``.
    """
    return switch_start(x, from_dim, to_dim, length=length, groups=groups).wait()


def switch_start(
    x: Tensor, from_dim: int, to_dim: int, *, length: int, groups: SequenceParallelGroups
) -> PendingSwitch:
    """Start a `switch`, of the same arguments, to wait for it after work that does not need its result.

    Returns:
        Its ``wait()`` is what `switch` returns. See `PendingSwitch` for what happens to gradients, and to a switch that
        nobody waits for.

    Raises:
        SequenceParallelConfigError: as `switch`.
    """
    axis = groups.dsp
    from_dim, to_dim = _dim(x, from_dim, "switch from_dim"), _dim(x, to_dim, "switch to_dim")
    if from_dim == to_dim:
        raise SequenceParallelConfigError(
            setting="switch",
            value=f"{from_dim} -> {to_dim}",
            why="a switch goes between two different dims",
            remedy="drop the switch where the next stage can keep the sharded dim",
        )
    _check_local(x, from_dim, length, axis.size, axis.rank)
    turn = Turn.even(to_dim, from_dim, x.shape[to_dim], length, axis.size)
    return PendingSwitch(x, turn, axis=axis, method="dsp")


def split(x: Tensor, dim: int, *, groups: SequenceParallelGroups) -> Tensor:
    """Start of a sharded region: this rank's part of ``x``, which every rank holds whole. See `comm.split`."""
    axis, dim = groups.dsp, _dim(x, dim, "split dim")
    return collectives.split(x, dim, Layout("contiguous", x.shape[dim], axis.size), axis=axis, method="dsp")


def gather(x: Tensor, dim: int, *, length: int, groups: SequenceParallelGroups) -> Tensor:
    """End of a sharded region: the whole of ``x`` on every rank, all of which do the same with it. See `comm.gather`.

    Args:
        length: size of ``dim`` over all ranks.
    """
    axis, dim = groups.dsp, _dim(x, dim, "gather dim")
    _check_local(x, dim, length, axis.size, axis.rank)
    return collectives.gather(x, dim, Layout("contiguous", length, axis.size), axis=axis, method="dsp")


def _dim(x: Tensor, dim: int, setting: str) -> int:
    if not -x.dim() <= dim < x.dim():
        raise SequenceParallelConfigError(
            setting=setting,
            value=dim,
            why=f"a tensor {tuple(x.shape)} has dims 0 to {x.dim() - 1}",
            remedy="count dims from 0, or back from -1",
        )
    return dim % x.dim()


def _check_local(x: Tensor, dim: int, length: int, size: int, rank: int) -> None:
    expected = shard_sizes(length, size)[rank]
    if x.shape[dim] != expected:
        raise SequenceParallelConfigError(
            setting="length",
            value=length,
            why=f"dim {dim} of a tensor {tuple(x.shape)} is taken to be sharded over {size} ranks, of which rank "
            f"{rank} holds {expected} of {length} entries, not {x.shape[dim]}",
            remedy="give the size that the sharded dim has over all ranks, and the dim that is sharded now",
        )


def switch_bytes(
    shape: tuple[int, ...], from_dim: int, to_dim: int, *, size: int, rank: int, element_size: int
) -> WireBytes:
    """Bytes leaving ``rank`` in one switch of an activation of global ``shape``: (P-1)/P * M/P where sizes divide.

    The backward pass switches the gradient the other way.
    """
    rest = prod(length for dim, length in enumerate(shape) if dim not in (from_dim, to_dim)) * element_size
    source, target = shard_sizes(shape[from_dim], size)[rank], shard_sizes(shape[to_dim], size)[rank]
    return WireBytes(
        forward=rest * source * (shape[to_dim] - target), backward=rest * target * (shape[from_dim] - source)
    )


def illegal(workload: Workload) -> list[str]:
    """Why DSP cannot serve the workload: never because of its heads, which it does not look at."""
    if workload.grid is not None and workload.grid[0] * workload.grid[1] != workload.length:
        return [f"grid={workload.grid} has {prod(workload.grid)} tokens but length={workload.length}: make them agree."]
    return []


def wire_bytes(workload: Workload, rank: int) -> WireBytes:
    """Bytes leaving ``rank`` in the two switches of one space+time layer on a ``[B, T, S, H*D]`` activation."""
    assert workload.grid is not None
    shape = (workload.batch, *workload.grid, workload.heads * workload.head_dim)
    there = switch_bytes(shape, 1, 2, size=workload.size, rank=rank, element_size=workload.element_size)
    back = switch_bytes(shape, 2, 1, size=workload.size, rank=rank, element_size=workload.element_size)
    return WireBytes(there.forward + back.forward, there.backward + back.backward)


METHOD = Method(
    name="dsp",
    kind="switch",
    paper="arXiv 2403.10266",
    axes=("ulysses",),
    layouts=("contiguous",),
    illegal=illegal,
    wire_bytes=wire_bytes,
)
