"""One axis of the mesh of ranks: whom a collective is between."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import cast

import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """One mesh axis as this rank sees it.

    Attributes:
        name: who it is for: ``sp``, ``ulysses``, ``ring``, ``dsp``, ``lasp`` or ``dp``.
        made: its process group, or what makes it where somebody first asks for `group`: on an axis that many programs
            never communicate on, that is a communicator less. None on an axis of size 1, which never communicates.
        rank: this rank's place on the axis.
        size: ranks on the axis.
        ranks: their global ranks, in axis order.
        debug: compare op, shapes and dtypes with the other ranks before each collective.
    """

    name: str
    made: ProcessGroup | Callable[[], ProcessGroup] | None
    rank: int
    size: int
    ranks: tuple[int, ...]
    debug: bool = False

    def __post_init__(self) -> None:
        assert self.size == len(self.ranks)
        assert 0 <= self.rank < self.size
        assert self.size == 1 or self.made is not None

    @property
    def group(self) -> ProcessGroup | None:
        """Its process group; None on an axis of size 1. A collective of the world where it has still to be made."""
        return self.made() if callable(self.made) else self.made

    @classmethod
    def alone(cls, name: str, global_rank: int = 0) -> Axis:
        """An axis of one rank."""
        return cls(name, None, 0, 1, (global_rank,))

    @classmethod
    def of_group(cls, name: str, group: ProcessGroup) -> Axis:
        """The axis over an existing process group, in the group's own rank order."""
        ranks = tuple(dist.get_process_group_ranks(group))
        rank = dist.get_rank(group)
        return cls(name, group if len(ranks) > 1 else None, rank, len(ranks), ranks)

    def renamed(self, name: str) -> Axis:
        """The same ranks and process group under another name."""
        return replace(self, name=name)

    def debugged(self, debug: bool) -> Axis:
        """The same axis with debug mode set as asked, or on where ``DSP_PLUGIN_DEBUG=1``."""
        return replace(self, debug=debug or os.environ.get("DSP_PLUGIN_DEBUG", "0") == "1")


def timeout_of(group: ProcessGroup) -> timedelta | None:
    """How long a collective of a process group may take; None where its backend does not say."""
    for device in group._device_types:
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if timeout is not None:
            return cast(timedelta, timeout)
    return None
