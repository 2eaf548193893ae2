"""Checkpoints in host memory: what activation checkpointing keeps of a stretch waits there for its backward pass.

A *stretch* is what a checkpoint runs again. Its inputs, and what `recompute.keep_attention` keeps of it, are copied to
the host beside computation as soon as they are there. When the next stretch begins, the copies of the one before are
joined and its tensors leave the device; so at most one stretch's tensors are on their way, and the last one's, which
the backward pass needs first, never leave. When a stretch is about to run again, those of the stretch before it start
to come back. (Ulysses Offload of arXiv 2408.16978 and ALST, arXiv 2506.13996, section 3.3, move the same tensors.)

Bytes of one storage go once, however many views of it are kept, by however many stretches. What the limit does not
hold stays on the device: as stretches come in order, these are the last, which are needed first.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.consent import go_on
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.training.extents import in_backward
from dsp_plugin.training.host_blocks import SETTING, Arrival, Block, Tally, extent
from dsp_plugin.training.host_copies import Copies, HostPool, Lease, copies_of


class Counts(NamedTuple):
    """What checkpoints take, in bytes of this rank. On CPU, where nothing moves, as if it had.

    Attributes:
        host: that wait in host memory now.
        host_peak: at most so far.
        host_held: of host memory taken for it, idle buffers included.
        device: of tensors above the floor that stay on the device.
        moved: to the host so far.
        stretches: checkpoints made so far.
    """

    host: int
    host_peak: int
    host_held: int
    device: int
    moved: int
    stretches: int


def worthwhile(checkpoints: int, free: int) -> bool:
    """Whether ``"auto"`` moves checkpoints to the host.

    Args:
        checkpoints: bytes that one forward pass keeps.
        free: bytes of the device that they and all that is computed share.
    """
    return 2 * checkpoints > free


class Offload:
    """Host memory for checkpoints, of one process.

    Args:
        limit: bytes on the host, at most; None for all that is kept.
        auto: move only what a forward pass keeps beyond half of the device's free memory, and from the next pass on
            all or nothing, as `worthwhile` says.
        floor: bytes below which tensors stay where they are; None for what their device says.
        copies: of a tensor, how it moves; None for one that stays.
        axis: ranks that hear of a refusal together.
    """

    def __init__(
        self,
        limit: int | None = None,
        *,
        auto: bool = False,
        floor: int | None = None,
        copies: Callable[[Tensor], Copies | None] = copies_of,
        axis: Axis | None = None,
    ) -> None:
        self.pool = HostPool(limit)
        self.floor, self.auto = floor, auto
        self.tally, self.stretches = Tally(), 0
        self.copies = copies
        self._axis = axis
        self._flying: list[weakref.ref[Block]] = []
        self._known: dict[int, _Shared] = {}
        self._last: weakref.ref[Stretch] | None = None
        self._turn: weakref.ref[Stretch] | None = None
        self._alive: weakref.WeakSet[Stretch] = weakref.WeakSet()
        self._pass_bytes, self._all = 0, False
        self._free: int | None = None

    def counts(self) -> Counts:
        """What there is now."""
        return Counts(
            self.pool.used, self.pool.peak, self.pool.held, self.tally.stayed, self.tally.moved, self.stretches
        )

    def stretch(self, inputs: Iterable[Any]) -> Stretch | None:
        """A checkpoint begins, of which these inputs are kept; None for one that runs in a backward pass.

        Raises:
            SequenceParallelConfigError: of the first one, the limit does not hold its inputs.
            RuntimeError: a tensor of the stretch before was changed in place on its way.
        """
        if in_backward():
            return None
        self._leave()
        if self.auto and not len(self._alive):
            self._begin_pass()
        stretch = Stretch(self, self._last() if self._last is not None else None)
        found = [x for x in inputs if isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter)]
        if not self.stretches:
            self._check(found)
        self.stretches += 1
        self._last = weakref.ref(stretch)
        self._alive.add(stretch)
        for tensor in found:
            stretch.add(tensor)
        return stretch

    def _check(self, inputs: list[Tensor]) -> None:
        nbytes = sum(x.numel() * x.element_size() for x in inputs if self.fits(x) is not None)
        refusal = None
        if self.pool.limit is not None and nbytes > self.pool.limit:
            shapes = ", ".join(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in inputs)
            refusal = SequenceParallelConfigError(
                setting=SETTING,
                value=f"{self.pool.limit} bytes",
                why=f"one checkpoint of this model keeps {shapes}, {nbytes} bytes, so that not one of them fits",
                remedy=f"set it to the bytes of some layers, {nbytes} each, or to true",
            )
        if self._axis is not None:
            go_on("the first checkpoint in host memory", refusal, self._axis)
        elif refusal is not None:
            raise refusal

    def fits(self, tensor: Tensor) -> Copies | None:
        """How a tensor moves; None for one that is too small to, or that nobody knows to move."""
        copies = self.copies(tensor)
        if copies is None:
            return None
        floor = copies.floor if self.floor is None else self.floor
        return copies if tensor.numel() * tensor.element_size() >= max(floor, 1) else None

    def block(self, tensor: Tensor) -> Block | None:
        """The bytes of a tensor, which begin to move if they have not; None where they stay."""
        copies = self.fits(tensor)
        if copies is None:
            return None
        storage = tensor.untyped_storage()
        shared = self._known.get(storage._cdata)
        if shared is not None:
            found = shared.block()
            if found is not None and found.covers(tensor):
                return found
        nbytes = extent(tensor)[1] * tensor.element_size()
        block = Block(tensor, copies, self.lease(nbytes, copies), self.tally)
        self._flying.append(weakref.ref(block))
        known, address = self._known, storage._cdata
        self._known[address] = _Shared(weakref.ref(storage, lambda _: known.pop(address, None)), weakref.ref(block))
        return block

    def lease(self, nbytes: int, copies: Copies) -> Lease | None:
        """Room on the host, where there is any and it is wanted."""
        if self.auto and not self._wanted(nbytes, copies):
            return None
        return self.pool.take(nbytes, copies)

    def turn_to(self, stretch: Stretch) -> None:
        """A stretch is about to run again: what it needs is there or comes at once, and the one before it follows."""
        now = self._turn() if self._turn is not None else None
        if now is stretch:
            return
        self._turn = weakref.ref(stretch)
        before = stretch.before() if stretch.before is not None else None
        if now is not None:
            ahead = now.before() if now.before is not None else None
            now.arrived.clear()
            if ahead is not None and ahead is not stretch:
                ahead.arrived.clear()
        stretch.fetch({})
        if before is not None:
            before.fetch(stretch.arrived)

    def _leave(self) -> None:
        flying, self._flying = self._flying, []
        for reference in flying:
            block = reference()
            if block is not None:
                block.leave()

    def _begin_pass(self) -> None:
        if self._free is not None:
            self._all = worthwhile(self._pass_bytes, self._free)
        self._pass_bytes = 0

    def _wanted(self, nbytes: int, copies: Copies) -> bool:
        if self._free is None:
            self._free = copies.free_bytes()
            if self._free is None:
                return False
        self._pass_bytes += nbytes
        return self._all or worthwhile(self._pass_bytes, self._free)


class _Shared(NamedTuple):
    storage: weakref.ref[Any]
    block: weakref.ref[Block]


class Stretch:
    """What one checkpoint keeps.

    Attributes:
        before: the one that was made before it, which the backward pass needs after it.
        arrived: of its blocks, those that are on the device again or on their way.
    """

    def __init__(self, offload: Offload, before: Stretch | None) -> None:
        self.before = None if before is None else weakref.ref(before)
        self.arrived: dict[Block, Arrival] = {}
        self._offload = offload
        # Only what handles hold is there to be fetched.
        self._blocks: weakref.WeakSet[Block] = weakref.WeakSet()
        self._own: list[Block] = []

    def add(self, tensor: Tensor) -> None:
        """Begin to move a tensor that is going to be packed."""
        if self.holds(tensor):
            return
        block = self._offload.block(tensor)
        if block is not None:
            self._own.append(block)

    def holds(self, tensor: Tensor) -> bool:
        """Whether it was added, and moves."""
        return any(block.covers(tensor) for block in self._own)

    def packed(self) -> None:
        """All that was added is packed, or is not going to be."""
        self._own.clear()

    def pack(self, tensor: Tensor, *, fresh: bool = False) -> Handle | Tensor:
        """What to keep in place of a tensor: of one that was not added the tensor itself, unless ``fresh``."""
        block = next((block for block in self._own if block.covers(tensor)), None)
        if block is None and fresh:
            block = self._offload.block(tensor)
        if block is None:
            return tensor
        self._blocks.add(block)
        return Handle(self, block, tensor)

    def bring(self, block: Block) -> Tensor:
        """The bytes of a block on the device, for what is computed from now on."""
        self._offload.turn_to(self)
        if block.here is not None:
            block.check()
            return block.here
        if block not in self.arrived:
            self.arrived[block] = Arrival(block)
        return self.arrived[block].flat()

    def fetch(self, there: dict[Block, Arrival]) -> None:
        """Begin to bring back all that is not here; what is ``there`` already is shared."""
        for block in self._blocks:
            if block.here is None and block not in self.arrived:
                self.arrived[block] = there[block] if block in there else Arrival(block)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While its function runs first: what is kept meanwhile belongs to it."""
        before, _local.stretch = current(), self
        try:
            yield
        finally:
            _local.stretch = before


_local = threading.local()


def current() -> Stretch | None:
    """The stretch whose function runs first, in this thread."""
    return getattr(_local, "stretch", None)


class Handle:
    """A kept tensor, wherever its bytes are.

    Attributes:
        requires_grad: as it was of the tensor.
        block: the bytes.
    """

    def __init__(self, stretch: Stretch, block: Block, tensor: Tensor) -> None:
        self.requires_grad = tensor.requires_grad
        self._stretch, self.block = stretch, block
        self._shape, self._stride = tensor.shape, tensor.stride()
        self._offset = tensor.storage_offset() - block.start

    def tensor(self) -> Tensor:
        """The tensor on its device, strided as it was, without a graph.

        Raises:
            RuntimeError: it was changed in place before it had left.
        """
        flat = self._stretch.bring(self.block)
        with torch.no_grad():
            return flat.as_strided(self._shape, self._stride, flat.storage_offset() + self._offset).detach()


def unpack(kept: Handle | Tensor) -> Tensor:
    """What was packed."""
    return kept.tensor() if isinstance(kept, Handle) else kept


_in_force: list[Offload] = []


def hold(offload: Offload) -> Callable[[], None]:
    """Have checkpoints of this process keep their tensors by ``offload``, until the returned function is called.

    Of several the newest serves all.
    """
    _in_force.append(offload)

    def release() -> None:
        _in_force[:] = [other for other in _in_force if other is not offload]

    return release


def in_force() -> Offload | None:
    """What checkpoints that are made now are to be kept by."""
    return _in_force[-1] if _in_force else None
