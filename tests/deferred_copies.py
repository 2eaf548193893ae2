"""Copies to host memory as a device's side stream makes them, on CPU: begun, and done no sooner than they must be."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from dsp_plugin.comm.axis import Axis
from dsp_plugin.training import host_budget
from dsp_plugin.training.offload import Offload


class Deferred:
    """Copies that wait in a queue until one of them is joined; then all that were begun before it are done, too.

    A copy whose source or target is gone by then, or that reads what was never written, shows: in ``faults``, or as
    values that are no numbers.
    """

    moves, page, floor = True, 1, 1

    def __init__(self, free: int | None = None) -> None:
        self.faults: list[str] = []
        self.begun = self.done = self.waited = 0
        self.free = free
        self._queue: deque[_Begun] = deque()

    def buffer(self, nbytes: int) -> Tensor:
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    def start(self, source: Tensor, target: Tensor) -> _Begun:
        self.begun += 1
        if target.is_floating_point():
            target.fill_(float("nan"))
        self._queue.append(_Begun(self, source, target))
        return self._queue[-1]

    def free_bytes(self) -> int | None:
        return self.free

    def run_until(self, copy: _Begun) -> None:
        while not copy.over:
            self._queue.popleft().run()

    def __call__(self, tensor: Tensor) -> Deferred:
        return self


class _Begun:
    def __init__(self, copies: Deferred, source: Tensor, target: Tensor) -> None:
        self.over = False
        self._copies = copies
        self._source, self._target = _Place(source), _Place(target)

    def join(self) -> None:
        self._copies.waited += 1
        self._copies.run_until(self)

    def run(self) -> None:
        self.over = True
        self._copies.done += 1
        source, target = self._source.tensor(), self._target.tensor()
        if source is None or target is None:
            self._copies.faults.append("a copy's " + ("source" if source is None else "target") + " was dropped")
            return
        target.copy_(source)


class _Place:
    """Where a tensor is, without holding it there."""

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._dtype, self._shape, self._start = tensor.dtype, tensor.shape, tensor.storage_offset()

    def tensor(self) -> Tensor | None:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            return None
        if storage.nbytes() < (self._start + self._shape.numel()) * self._dtype.itemsize:
            # Freed under the copy, which reads whatever is there now.
            return torch.full(self._shape, float("nan"), dtype=self._dtype)
        return torch.empty(0, dtype=self._dtype).set_(storage, self._start, self._shape, (1,))


def deferring(
    limit: int | None = None,
    *,
    floor: int | None = None,
    free: int | None = None,
    auto: bool = False,
    axis: Axis | None = None,
) -> Offload:
    """An `Offload` that really moves CPU tensors; its ``copies`` are `Deferred`."""
    return Offload(limit, floor=floor, copies=Deferred(free), auto=auto, axis=axis)


def copies_of(offload: Offload) -> Deferred:
    """The copies of one that is `deferring`."""
    assert isinstance(offload.copies, Deferred)
    return offload.copies


@contextmanager
def settings_defer() -> Iterator[list[Offload]]:
    """Inside, what the setting ``memory.offload`` asks for is `deferring`; the list gets each."""
    made: list[Offload] = []

    def make(*args: Any, **kwargs: Any) -> Offload:
        made.append(deferring(*args, **kwargs))
        return made[-1]

    before, host_budget.Offload = host_budget.Offload, make  # type: ignore[misc, assignment]
    try:
        yield made
    finally:
        host_budget.Offload = before  # type: ignore[misc]
