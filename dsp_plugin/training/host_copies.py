"""Host memory for what a device can do without for a while: copies beside computation, into buffers that are reused."""

from __future__ import annotations

import threading
import weakref
from bisect import bisect_left, insort
from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dsp_plugin.errors import UnsupportedError

PAGE = 4096
FLOOR = 1 << 20
"""On a device, tensors of fewer bytes stay where they are: a copy of them costs more than it frees."""


class Copy(Protocol):
    """A copy that was begun."""

    def join(self) -> None:
        """What is computed from now on comes after it; the host does not wait."""


class Copies(Protocol):
    """Begins copies between a device and the host; in the order in which they begin, they are done.

    Attributes:
        moves: whether anything has to be copied; else host memory is what the device computes in.
        page: buffers come in multiples of so many bytes.
        floor: tensors of fewer bytes are not worth it.
    """

    moves: bool
    page: int
    floor: int

    def buffer(self, nbytes: int) -> Tensor:
        """[nbytes], uint8, in host memory."""

    def start(self, source: Tensor, target: Tensor) -> Copy:
        """Begin to copy, after all that has been computed so far. Both must be there until the copy was joined."""

    def free_bytes(self) -> int | None:
        """Of the device, what is left to computation; None where nobody knows."""


class _Done:
    def join(self) -> None:
        """Nothing is left to do."""


_DONE = _Done()


class InPlace:
    """Of the CPU: what it computes with is in host memory, so that nothing moves, and all is counted as if it had."""

    moves, page, floor = False, 1, 1

    def buffer(self, nbytes: int) -> Tensor:
        """Not asked for where nothing moves."""
        raise AssertionError("nothing moves")

    def start(self, source: Tensor, target: Tensor) -> Copy:
        """Likewise."""
        raise AssertionError("nothing moves")

    def free_bytes(self) -> int | None:
        """Nobody has to decide by it."""
        return None


class AtOnce:
    """Of tensors without data: dry runs see bytes leave the device and come back."""

    moves, page, floor = True, 1, FLOOR

    def buffer(self, nbytes: int) -> Tensor:
        """See `Copies.buffer`."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def start(self, source: Tensor, target: Tensor) -> Copy:
        """See `Copies.start`."""
        target.copy_(source, non_blocking=True)
        return _DONE

    def free_bytes(self) -> int | None:
        """A device that does not exist has nothing to fall short of."""
        return None


class Cuda:
    """Of one CUDA device: a stream of its own, and pages that are locked once.

    One stream for both directions: so a buffer may be given to the next copy as soon as the last one has begun.
    """

    moves, page, floor = True, PAGE, FLOOR

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def buffer(self, nbytes: int) -> Tensor:
        """See `Copies.buffer`. Torch's own pinned memory comes in powers of two, up to twice what is asked for.

        Raises:
            UnsupportedError: so much memory cannot be had or locked.
        """
        runtime = torch.cuda.cudart()
        try:
            buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
            refused = int(runtime.cudaHostRegister(buffer.data_ptr(), nbytes, 0))
        except RuntimeError as error:
            raise _no_memory(nbytes, str(error)) from error
        if refused:
            raise _no_memory(nbytes, f"cudaHostRegister returned {refused}")
        released = weakref.finalize(buffer, _unlock, runtime, self._stream, buffer.data_ptr())
        released.atexit = False
        return buffer

    def start(self, source: Tensor, target: Tensor) -> Copy:
        """See `Copies.start`."""
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return _Event(self._device, computing, self._stream.record_event())

    def free_bytes(self) -> int | None:
        """What the driver has left, and what the allocator holds and has not given out."""
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + unused


class _Event:
    def __init__(self, device: torch.device, computing: torch.cuda.Stream, event: torch.cuda.Event) -> None:
        self._device, self._computing, self._event = device, computing, event

    def join(self) -> None:
        # Memory goes back to the stream that it was taken on, whichever computes with it.
        self._computing.wait_event(self._event)
        now = torch.cuda.current_stream(self._device)
        if now != self._computing:
            now.wait_event(self._event)


def _unlock(runtime: Any, stream: torch.cuda.Stream, address: int) -> None:
    stream.synchronize()
    runtime.cudaHostUnregister(address)


def _no_memory(nbytes: int, why: str) -> UnsupportedError:
    return UnsupportedError(
        setting="memory.offload",
        why=f"{nbytes} more bytes of host memory could not be had for checkpoints ({why})",
        remedy='set it to an amount that there is, such as "40GiB" a rank, or raise the limit on locked memory',
    )


_lock = threading.Lock()
_of_device: dict[torch.device, Copies] = {}
_IN_PLACE, _AT_ONCE = InPlace(), AtOnce()


def copies_of(tensor: Tensor) -> Copies | None:
    """How a tensor gets to host memory and back; None where nobody here knows."""
    if isinstance(tensor, FakeTensor):
        return _AT_ONCE if tensor.device.type != "cpu" else _IN_PLACE
    if type(tensor) not in (Tensor, torch.nn.Buffer) or tensor.layout is not torch.strided:
        return None
    if tensor.device.type == "cpu":
        return _IN_PLACE
    if tensor.device.type != "cuda":
        return None
    with _lock:
        if tensor.device not in _of_device:
            _of_device[tensor.device] = Cuda(tensor.device)
        return _of_device[tensor.device]


class Lease:
    """Bytes of a pool, until it is given back or dropped.

    Attributes:
        buffer: [nbytes], uint8, or more; None where nothing moves.
    """

    def __init__(self, pool: HostPool, buffer: Tensor | None, nbytes: int) -> None:
        self.buffer, self.nbytes = buffer, nbytes
        self._returned = pool._returned

    def __del__(self) -> None:
        # At any time, in any thread, also while the pool's lock is held here.
        self._returned.append((self.buffer, self.nbytes))


class HostPool:
    """Buffers in host memory, reused from step to step.

    Args:
        limit: most bytes at a time; None for no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.peak = 0
        self._lock = threading.Lock()
        self._returned: deque[tuple[Tensor | None, int]] = deque()
        self._idle: list[tuple[int, int, Tensor]] = []
        self._used = self._unused = self._made = 0

    @property
    def used(self) -> int:
        """Bytes that wait on the host now."""
        with self._lock:
            self._collect()
            return self._used

    @property
    def held(self) -> int:
        """Bytes of host memory that are taken, idle buffers included."""
        with self._lock:
            self._collect()
            return self._used + self._unused

    @property
    def made(self) -> int:
        """Buffers that were made so far."""
        return self._made

    def take(self, nbytes: int, copies: Copies) -> Lease | None:
        """Host memory for ``nbytes``; None where the limit leaves none."""
        with self._lock:
            self._collect()
            found = self._reused(nbytes) if copies.moves else None
            if found is None:
                size = -(-nbytes // copies.page) * copies.page
                if self.limit is not None and self._used + size > self.limit:
                    return None
                while self.limit is not None and self._idle and self._used + self._unused + size > self.limit:
                    self._unused -= self._idle.pop()[0]
                found = copies.buffer(size) if copies.moves else None
                self._made += copies.moves
            else:
                size = found.numel()
            self._used += size
            self.peak = max(self.peak, self._used)
            return Lease(self, found, size)

    def _reused(self, nbytes: int) -> Tensor | None:
        """The smallest idle buffer that is large enough, if it is not more than a quarter too large."""
        place = bisect_left(self._idle, (nbytes, 0))
        if place == len(self._idle) or self._idle[place][0] > nbytes + nbytes // 4 + PAGE:
            return None
        size, _, buffer = self._idle.pop(place)
        self._unused -= size
        return buffer

    def _collect(self) -> None:
        while self._returned:
            buffer, nbytes = self._returned.popleft()
            self._used -= nbytes
            if buffer is not None:
                insort(self._idle, (nbytes, id(buffer), buffer))
                self._unused += nbytes
