"""The choke point: every byte this library sends goes through here, is counted here, and is checked here in debug mode.

Functions move raw buffers and know nothing of autograd. Data moves as bytes, so that every dtype works on every backend
(gloo has no bfloat16 all-to-all).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dsp_plugin.comm.agreement import Shapes, agree
from dsp_plugin.comm.ledger import Phase, record
from dsp_plugin.groups import Axis


@dataclass(frozen=True)
class Sender:
    """On whose behalf something is sent: what the ledger books it under."""

    axis: Axis
    method: str
    phase: Phase

    def backward(self) -> Sender:
        """The same sender in the backward pass."""
        return Sender(self.axis, self.method, "backward")


def exchange(
    buffer: Tensor,
    send_counts: Sequence[int],
    receive_counts: Sequence[int],
    sender: Sender,
    whole_shapes: Shapes = (),
) -> Tensor:
    """All-to-all of a flat ``buffer`` whose parts for each rank lie in rank order.

    Args:
        buffer: 1-D, contiguous, ``sum(send_counts)`` elements.
        send_counts: elements for each rank of the axis.
        receive_counts: elements from each rank.
        whole_shapes: of the unsharded tensors in the buffer, on which ranks must agree; compared in debug mode.

    Returns:
        1-D, ``sum(receive_counts)`` elements, in rank order.
    """
    axis = sender.axis
    assert buffer.dim() == 1
    assert buffer.numel() == sum(send_counts)
    if axis.size == 1:
        return buffer
    _enter("all_to_all", buffer.dtype, send_counts, receive_counts, sender, whole_shapes)
    received = buffer.new_empty(sum(receive_counts))
    width = buffer.element_size()
    dist.all_to_all_single(
        received.view(torch.uint8),
        buffer.view(torch.uint8),
        [count * width for count in receive_counts],
        [count * width for count in send_counts],
        group=axis.group,
    )
    return received


def collect(buffer: Tensor, counts: Sequence[int], sender: Sender, whole_shapes: Shapes = ()) -> list[Tensor]:
    """All-gather of flat buffers whose lengths may differ.

    Args:
        buffer: 1-D, contiguous, ``counts[rank]`` elements.
        counts: elements that each rank contributes.
        whole_shapes: as for `exchange`.

    Returns:
        The flat buffer of every rank, in rank order.
    """
    axis = sender.axis
    assert buffer.dim() == 1
    assert buffer.numel() == counts[axis.rank]
    if axis.size == 1:
        return [buffer]
    sends = [0 if peer == axis.rank else buffer.numel() for peer in range(axis.size)]
    receives = [0 if peer == axis.rank else count for peer, count in enumerate(counts)]
    _enter("all_gather", buffer.dtype, sends, receives, sender, whole_shapes)
    if len(set(counts)) == 1:
        gathered = buffer.new_empty(sum(counts))
        dist.all_gather_into_tensor(gathered.view(torch.uint8), buffer.view(torch.uint8), group=axis.group)
        return list(gathered.split(list(counts)))
    parts = [buffer if peer == axis.rank else buffer.new_empty(count) for peer, count in enumerate(counts)]
    transfers = [(peer, buffer, parts[peer]) for peer in range(axis.size) if peer != axis.rank]
    _wait(_post([(p, send) for p, send, _ in transfers], [(p, part) for p, _, part in transfers], axis))
    return parts


class Hop:
    """A transfer to one neighbour on the axis, and from the other, in flight from construction until `wait`."""

    def __init__(self, buffer: Tensor, receive_count: int, shift: int, sender: Sender) -> None:
        axis = sender.axis
        assert buffer.dim() == 1 and shift % axis.size != 0, "a hop goes to another rank"
        to, origin = (axis.rank + shift) % axis.size, (axis.rank - shift) % axis.size
        sends = [buffer.numel() if peer == to else 0 for peer in range(axis.size)]
        receives = [receive_count if peer == origin else 0 for peer in range(axis.size)]
        _enter("ring_hop", buffer.dtype, sends, receives, sender)
        # The sent buffer must stay alive and unwritten until the transfer is over.
        self._sent = buffer
        self._received = buffer.new_empty(receive_count)
        self._works = _post([(to, buffer)], [(origin, self._received)], axis)

    def wait(self) -> Tensor:
        """The received flat buffer; returns once both directions are done."""
        _wait(self._works)
        return self._received


def _post(sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], axis: Axis) -> list[dist.Work]:
    operations = [
        dist.P2POp(kind, tensor.view(torch.uint8), axis.ranks[peer], axis.group)
        for kind, transfers in ((dist.isend, sends), (dist.irecv, receives))
        for peer, tensor in transfers
        if tensor.numel()
    ]
    return dist.batch_isend_irecv(operations) if operations else []


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


def _enter(
    collective: str,
    dtype: torch.dtype,
    sends: Sequence[int],
    receives: Sequence[int],
    sender: Sender,
    whole_shapes: Shapes = (),
) -> None:
    axis = sender.axis
    if axis.debug:
        agree(f"{collective} by {sender.method} in {sender.phase}", dtype, whole_shapes, sends, receives, axis)
    leaving = sum(count for peer, count in enumerate(sends) if peer != axis.rank)
    record(sender.method, collective, axis.name, sender.phase, leaving * dtype.itemsize)
