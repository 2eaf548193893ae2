"""Runs of a tensor's bytes on their way to host memory and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsp_plugin.training.host_copies import Copies, Copy, Lease

SETTING = "memory.offload"


@dataclass
class Tally:
    """Bytes.

    Attributes:
        moved: to the host so far.
        stayed: that are on the device now, for want of room on the host.
    """

    moved: int = 0
    stayed: int = 0


def span(tensor: Tensor) -> int:
    """Elements of its storage from the first to the last that a tensor has."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def extent(tensor: Tensor) -> tuple[int, int]:
    """Of its storage, where what is moved with a tensor begins, and how many elements that are.

    All of it where others lie between the tensor's own: heads of keys lie between those of queries that arrived in one
    buffer, and each would take the others along.
    """
    count, whole = span(tensor), tensor.untyped_storage().nbytes() // tensor.element_size()
    if count > tensor.numel() and whole <= 2 * count:
        return 0, whole
    return int(tensor.storage_offset()), count


class Block:
    """A run of a storage's bytes, on the device, on the host, or between.

    Args:
        lease: of the host's memory; None for bytes that stay.

    Attributes:
        here: [span], on the device; None where they have left.
    """

    _lease: Lease | None = None
    _copy: Copy | None = None
    _counted = 0

    def __init__(self, tensor: Tensor, copies: Copies, lease: Lease | None, tally: Tally) -> None:
        self.copies, (self.start, self.span) = copies, extent(tensor)
        self.dtype, self.device = tensor.dtype, tensor.device
        self.nbytes = self.span * tensor.element_size()
        self._tally, self._version, self._cdata = tally, tensor._version, tensor.untyped_storage()._cdata
        self._storage_bytes = tensor.untyped_storage().nbytes()
        with torch.no_grad():
            self.here: Tensor | None = tensor.detach().as_strided((self.span,), (1,), self.start)
        self._lease = lease
        if lease is None:
            self._count()
            return
        tally.moved += self.nbytes
        if copies.moves:
            with torch.no_grad():
                self._copy = copies.start(self.here, self.there())

    def there(self) -> Tensor:
        """[span], on the host."""
        assert self._lease is not None, "it stays on the device"
        assert self._lease.buffer is not None, "nothing moves"
        return self._lease.buffer[: self.nbytes].view(self.dtype)

    def covers(self, tensor: Tensor) -> bool:
        """Whether the bytes of a tensor are among these, unchanged."""
        if tensor.untyped_storage()._cdata != self._cdata or tensor.dtype != self.dtype:
            return False
        start = tensor.storage_offset()
        inside = self.start <= start and start + span(tensor) <= self.start + self.span
        return inside and tensor._version == self._version

    def leave(self) -> None:
        """The device's bytes go, once their copy is done."""
        if self._copy is None:
            return
        assert self.here is not None
        self.check()
        self._copy.join()
        self._copy = None
        if self.here.untyped_storage().nbytes() != self._storage_bytes:
            # Somebody freed the storage behind everyone's back, to fill it again before the backward pass, as
            # Megatron's CheckpointWithoutOutput does. What was copied may be anything.
            self._stay()
        else:
            self.here = None

    def check(self) -> None:
        """That nobody changed the bytes that are here."""
        if self.here is not None and self.here._version != self._version:
            raise RuntimeError(
                f"a tensor that activation checkpointing keeps ({self.span} elements of "
                f"{str(self.dtype).removeprefix('torch.')}) was changed in place (version {self._version}, now "
                f"{self.here._version}) while {SETTING} copied it to host memory. Use an operation that is not in "
                "place, or put it before the checkpoint."
            )

    def _stay(self) -> None:
        self._tally.moved -= self.nbytes
        self._lease = None
        self._count()

    def _count(self) -> None:
        self._tally.stayed += self.nbytes
        self._counted = self.nbytes

    def __del__(self) -> None:
        self._tally.stayed -= self._counted
        if self._copy is not None:
            # Nobody will read the copy, but its source must be there until it is done.
            self._copy.join()


class Arrival:
    """A block's bytes on their way back."""

    _copy: Copy | None = None

    def __init__(self, block: Block) -> None:
        with torch.no_grad():
            self._flat = torch.empty(block.span, dtype=block.dtype, device=block.device)
            self._copy = block.copies.start(block.there(), self._flat)

    def flat(self) -> Tensor:
        """[span], for what is computed from now on."""
        if self._copy is not None:
            self._copy.join()
            self._copy = None
        return self._flat

    def __del__(self) -> None:
        if self._copy is not None:
            self._copy.join()
