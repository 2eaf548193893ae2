"""What backends are asked to move, one transfer at a time, for who looks on: which ranks, what to and from whom, when
waited for.

The choke point in `dsp_plugin.comm.wire` tells every open observer. Nobody looks on unless asked to, and nothing that
is sent depends on it. Observers are process-wide, as ledgers are: backward passes run on other threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Transfer:
    """One call of a backend.

    Attributes:
        kind: ``point_to_point`` for sends and receives that are posted together.
        ranks: the global ranks of the communicator, in its order.
        sends: ``(global rank, bytes)`` of every part that leaves, in the order posted; of what is
            no ``point_to_point`` for every rank, this one included.
        receives: the same of what arrives.
        sent: the buffers that it reads.
        received: the buffers that it writes.
    """

    kind: Literal["all_to_all", "all_gather", "all_reduce", "point_to_point"]
    ranks: tuple[int, ...]
    sends: tuple[tuple[int, int], ...]
    receives: tuple[tuple[int, int], ...]
    sent: tuple[Tensor, ...]
    received: tuple[Tensor, ...]


class TransferObserver(Protocol):
    """Who looks on."""

    def started(self, transfer: Transfer) -> None:
        """The backend has been asked for it."""

    def waited(self, transfer: Transfer) -> None:
        """This thread, on CUDA its stream, has waited for it."""


_open: list[TransferObserver] = []


@contextmanager
def observing(observer: TransferObserver) -> Iterator[None]:
    """Tell the observer of every transfer in the block."""
    _open.append(observer)
    try:
        yield
    finally:
        _open.remove(observer)


class Works:
    """What a backend has to finish for one transfer.

    Args:
        works: its own; none where it has already been waited for.
        transfer: what it moves; asked for only where somebody looks on.
    """

    def __init__(self, works: Sequence[dist.Work], transfer: Callable[[], Transfer]) -> None:
        self._works = works
        self._transfer = transfer() if _open else None
        self._tell("started")

    def wait(self) -> None:
        """Wait for all of them."""
        for work in self._works:
            work.wait()
        self._tell("waited")

    def _tell(self, event: Literal["started", "waited"]) -> None:
        if self._transfer is not None:
            for observer in _open:
                getattr(observer, event)(self._transfer)
