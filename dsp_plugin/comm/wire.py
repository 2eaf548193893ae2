"""The choke point: every byte this library sends goes through here, is counted here, and is checked here in debug mode.

Functions move raw buffers and know nothing of autograd. Data moves as bytes, so that every dtype works on every backend
(gloo has no bfloat16 all-to-all).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from dsp_plugin.comm.agreement import Shapes, agree, explained
from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.ledger import Phase, record
from dsp_plugin.comm.meter import waiting
from dsp_plugin.comm.transfers import Transfer, Works

# torch 2.13 renamed it and warns at the old name.
_all_gather_single = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor


# The devices on which a group's communicator has all of its ranks.
_joined: WeakKeyDictionary[ProcessGroup, set[torch.device]] = WeakKeyDictionary()


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
    *,
    into: Tensor | None = None,
) -> Tensor:
    """All-to-all of a flat ``buffer`` whose parts for each rank lie in rank order.

    Args:
        buffer: 1-D, contiguous, ``sum(send_counts)`` elements.
        send_counts: elements for each rank of the axis.
        receive_counts: elements from each rank.
        whole_shapes: of the unsharded tensors in the buffer, on which ranks must agree; compared in debug mode.
        into: where what arrives is put, 1-D and contiguous; a buffer of its own if None.

    Returns:
        1-D, ``sum(receive_counts)`` elements, in rank order.
    """
    axis = sender.axis
    assert buffer.dim() == 1
    assert buffer.numel() == sum(send_counts)
    if axis.size == 1:
        return buffer if into is None else into.copy_(buffer)
    _enter("all_to_all", buffer.dtype, send_counts, receive_counts, sender, whole_shapes)
    received = buffer.new_empty(sum(receive_counts)) if into is None else into
    with _underway(buffer.is_cuda):
        _all_to_all(received, buffer, receive_counts, send_counts, axis, start_only=False).wait()
    return received


class Exchange:
    """An all-to-all in flight from construction until `wait`. Between two ranks or more.

    Args:
        buffer: 1-D, contiguous, ``sum(send_counts)`` elements; it must stay unwritten until `wait` returns.
        received: 1-D, contiguous, ``sum(receive_counts)`` elements: where what arrives is put, unread until then.
        send_counts: elements for each rank of the axis.
        receive_counts: elements from each rank.
        whole_shapes: as for `exchange`.
    """

    def __init__(
        self,
        buffer: Tensor,
        received: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        sender: Sender,
        whole_shapes: Shapes,
    ) -> None:
        assert sender.axis.size > 1
        assert buffer.shape == (sum(send_counts),)
        assert received.shape == (sum(receive_counts),)
        _enter("all_to_all", buffer.dtype, send_counts, receive_counts, sender, whole_shapes)
        self._buffers = buffer, received
        self._works = _all_to_all(received, buffer, receive_counts, send_counts, sender.axis, start_only=True)

    def wait(self) -> None:
        """Returns once all that was sent and received is done; to be called once."""
        _wait([self._works], self._buffers[0].is_cuda)
        for buffer in self._buffers:
            if buffer.is_cuda:
                # Its memory belongs to the stream that it was made on, which need not be the one that waits here.
                buffer.record_stream(torch.cuda.current_stream(buffer.device))
        del self._buffers, self._works


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
        with _underway(buffer.is_cuda):
            _all_gather(gathered, buffer, axis, start_only=False).wait()
        return list(gathered.split(list(counts)))
    parts = [buffer if peer == axis.rank else buffer.new_empty(count) for peer, count in enumerate(counts)]
    transfers = [(peer, buffer, parts[peer]) for peer in range(axis.size) if peer != axis.rank]
    works = _post([(p, send) for p, send, _ in transfers], [(p, part) for p, _, part in transfers], axis, buffer)
    _wait(works, buffer.is_cuda)
    return parts


class Transfers:
    """Point-to-point transfers of one round, in flight from construction until `wait`.

    Every rank of the axis takes part in every round, also one with nothing to send: backends match the operations of a
    pair in order, and debug mode compares all ranks.

    Args:
        sends: flat buffers by the rank on the axis that each goes to; none to this rank. They must stay unwritten until
            `wait` returns.
        receives: elements by the rank on the axis that they come from.
        like: a tensor of the dtype and device of all buffers.
        collective: the name for the ledger.
    """

    def __init__(
        self, sends: Mapping[int, Tensor], receives: Mapping[int, int], like: Tensor, collective: str, sender: Sender
    ) -> None:
        axis = sender.axis
        assert axis.rank not in sends
        assert axis.rank not in receives
        send_counts = [sends[peer].numel() if peer in sends else 0 for peer in range(axis.size)]
        _enter(collective, like.dtype, send_counts, [receives.get(peer, 0) for peer in range(axis.size)], sender)
        self._sent, self._on_cuda = dict(sends), like.is_cuda
        self._received = {peer: like.new_empty(count) for peer, count in receives.items()}
        self._works = _post(list(self._sent.items()), list(self._received.items()), axis, like)

    def wait(self) -> dict[int, Tensor]:
        """What arrived, flat, by sender; returns once everything sent and received is done. May be called again."""
        # gloo counts completions: to wait for one twice is to wait for ever.
        works, self._works = self._works, []
        _wait(works, self._on_cuda)
        return self._received


class Collection:
    """An all-gather of flat buffers of one length, in flight from construction until `wait`.

    Args:
        buffer: 1-D, contiguous; it must stay unwritten until `wait` returns.
    """

    def __init__(self, buffer: Tensor, sender: Sender) -> None:
        axis = sender.axis
        assert buffer.dim() == 1
        counts = [0 if peer == axis.rank else buffer.numel() for peer in range(axis.size)]
        _enter("all_gather", buffer.dtype, counts, counts, sender)
        self._sent, self._parts = buffer, axis.size
        self._gathered = buffer.new_empty(axis.size * buffer.numel())
        self._work = _all_gather(self._gathered, buffer, axis, start_only=True)

    def wait(self) -> tuple[Tensor, ...]:
        """The buffer of every rank, in rank order."""
        _wait([self._work], self._sent.is_cuda)
        return self._gathered.chunk(self._parts)


def _all_to_all(
    received: Tensor,
    buffer: Tensor,
    receive_counts: Sequence[int],
    send_counts: Sequence[int],
    axis: Axis,
    start_only: bool,
) -> Works:
    width = buffer.element_size()
    receives, sends = ([count * width for count in counts] for counts in (receive_counts, send_counts))
    work = dist.all_to_all_single(
        received.view(torch.uint8), buffer.view(torch.uint8), receives, sends, group=axis.group, async_op=start_only
    )
    return Works(
        [work] if start_only else [],
        lambda: Transfer("all_to_all", axis.ranks, _by(axis, sends), _by(axis, receives), (buffer,), (received,)),
    )


def _all_gather(gathered: Tensor, buffer: Tensor, axis: Axis, start_only: bool) -> Works:
    work = _all_gather_single(
        gathered.view(torch.uint8), buffer.view(torch.uint8), group=axis.group, async_op=start_only
    )
    parts = [buffer.numel() * buffer.element_size()] * axis.size
    return Works(
        [work] if start_only else [],
        lambda: Transfer("all_gather", axis.ranks, _by(axis, parts), _by(axis, parts), (buffer,), (gathered,)),
    )


def _by(axis: Axis, parts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(axis.ranks, parts, strict=True))


def _post(sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], axis: Axis, like: Tensor) -> list[Works]:
    """Starts transfers of one round, which every rank of the axis enters."""
    _join(axis, like.device)
    sends, receives = ([(peer, x) for peer, x in transfers if x.numel()] for transfers in (sends, receives))
    if not sends and not receives:
        return []
    # Receives first: behind a send of its own, gloo's word that a rank is ready to receive would wait for that send.
    operations = [
        dist.P2POp(kind, tensor.view(torch.uint8), axis.ranks[peer], axis.group)
        for kind, transfers in ((dist.irecv, receives), (dist.isend, sends))
        for peer, tensor in transfers
    ]

    def transfer() -> Transfer:
        (to, sent), (origin, received) = (
            (
                tuple((axis.ranks[peer], x.numel() * x.element_size()) for peer, x in transfers),
                tuple(x for _, x in transfers),
            )
            for transfers in (sends, receives)
        )
        return Transfer("point_to_point", axis.ranks, to, origin, sent, received)

    return [Works(dist.batch_isend_irecv(operations), transfer)]


def _join(axis: Axis, device: torch.device) -> None:
    """Brings every rank of the axis into its communicator, before a round in which some have nothing to send.

    NCCL makes a communicator at the first operation of a group, and waits there for all of its ranks.
    """
    if device.type != "cuda":
        return
    assert axis.group is not None
    joined = _joined.setdefault(axis.group, set())
    if device not in joined:
        token = torch.zeros(1, device=device)
        dist.all_reduce(token, group=axis.group)
        parts = _by(axis, [token.element_size()] * axis.size)
        Works([], lambda: Transfer("all_reduce", axis.ranks, parts, parts, (token,), (token,))).wait()
        joined.add(device)


@contextmanager
def _underway(on_cuda: bool) -> Iterator[None]:
    """A block that waits for other ranks: it is counted as such, and its errors say how to learn more."""
    with explained(), waiting(on_cuda):
        yield


def _wait(works: Sequence[Works], on_cuda: bool) -> None:
    with _underway(on_cuda):
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
