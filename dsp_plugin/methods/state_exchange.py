"""Three exact ways for ranks to learn which state enters their stretch of the sequence.

All get each rank's summary (see `kernels.linear_state`) and give it the state that leaves the rank before it. X bytes
is one state, B * H * K * V * 4 (8 for fp64), T bytes one transition that other ranks cannot know: 0 for no decay or one
per head, else B * H * 4 times 1 (scalar), K (per key dim) or K^2 (delta rules).

- ``ring`` (LASP, arXiv 2404.02882): states go from rank to rank, each waiting for the one before. X bytes, P - 1 hops.
- ``scan`` (ZeCO, arXiv 2507.01004): the same in blocks of value columns, which are independent of each other, so that a
  rank sends one block on while it receives the next. X bytes; the hops overlap.
- ``allgather`` (LASP-2, arXiv 2502.07563): every rank gets every summary and adds up those before it. (P - 1) (X + T)
  bytes, one step. Transitions are kept, so backward sends (P - 1) X.

Gradients of states go the other way.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt
from typing import Literal

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.wire import Collection, Sender, Transfers
from dsp_plugin.kernels.linear import Alone, Arriving, StateExchange
from dsp_plugin.kernels.linear_state import apply, transposed

ExchangeName = Literal["auto", "ring", "allgather", "scan"]
EXCHANGES = ("ring", "allgather", "scan")
METHOD = "lasp"

# What the choice assumes of the network: seconds to start a transfer, bytes per second of a link.
_LATENCY, _BANDWIDTH = 20e-6, 20e9


def scan_blocks(state_bytes: int, columns: int, size: int) -> int:
    """Into how many blocks of value columns ``scan`` cuts a state: where shorter steps and more of them balance."""
    if size < 3:
        return 1
    best = sqrt((size - 2) * state_bytes / (_LATENCY * _BANDWIDTH))
    return max(1, min(columns, round(best)))


def choose_exchange(name: str, state_bytes: int, transition_bytes: int, columns: int, size: int) -> str:
    """The exchange of that name; for ``auto`` the one that should take the least time by latency and bandwidth."""
    if name != "auto":
        return name

    def seconds(nbytes: float) -> float:
        return _LATENCY + nbytes / _BANDWIDTH

    blocks = scan_blocks(state_bytes, columns, size)
    costs = {
        "allgather": seconds((size - 1) * (state_bytes + transition_bytes)),
        "ring": (size - 1) * seconds(state_bytes),
        "scan": (size - 2 + blocks) * seconds(state_bytes / blocks),
    }
    return min(costs, key=lambda name: costs[name])


@dataclass(frozen=True)
class Chain:
    """``ring`` and ``scan``: a pipeline along the ranks.

    Attributes:
        forgets: a document starts in this rank's stretch, so that no state passes it.
        scanned: cut states into blocks.
    """

    axis: Axis
    forgets: bool
    scanned: bool

    @property
    def first(self) -> bool:
        """Whether nothing comes before this rank."""
        return self.axis.rank == 0

    def forward(self, transition: Tensor | None, state: Tensor) -> Arriving:
        """See `StateExchange`."""
        return _Pipeline(transition, state, Sender(self.axis, METHOD, "forward"), self)

    def backward(self, transition: Tensor | None, gradient: Tensor, kept: Tensor | None) -> Arriving:
        """See `StateExchange`."""
        return _Pipeline(transition, gradient, Sender(self.axis, METHOD, "backward"), self)


class _Pipeline:
    """One pass along the ranks, in waves.

    In wave w, the rank at place p sends block ``w - p`` on and gets block ``w - p + 1``. Every rank takes part in every
    wave, if only in debug mode's comparison.
    """

    kept: Tensor | None = None

    def __init__(self, transition: Tensor | None, state: Tensor, sender: Sender, chain: Chain) -> None:
        axis = sender.axis
        backwards = sender.phase == "backward"
        self._sender, self._transition, self._like = sender, transition, state
        self._place = axis.size - 1 - axis.rank if backwards else axis.rank
        self._alone = self._place == 0 or chain.forgets
        self._before, self._after = (axis.rank + 1, axis.rank - 1) if backwards else (axis.rank - 1, axis.rank + 1)
        columns = state.shape[-1]
        blocks = scan_blocks(state.numel() * state.element_size(), columns, axis.size) if chain.scanned else 1
        self._states = list(state.tensor_split(blocks, -1))
        self._arrived: list[Tensor] = []
        self._waves: list[Transfers] = []
        self._count = axis.size - 2 + blocks
        # The first rank knows all blocks, every other waits for its first.
        while len(self._waves) < (self._count if self._place == 0 else self._place):
            self._post()

    def wait(self) -> Tensor | None:
        """See `Arriving`."""
        while len(self._waves) < self._count:
            self._take()
            self._post()
        self._take()
        for wave in self._waves:
            wave.wait()
        return torch.cat(self._arrived, -1) if self._arrived else None

    def _post(self) -> None:
        wave = len(self._waves)
        sends, receives = {}, {}
        leaving, coming = wave - self._place, wave - self._place + 1
        if 0 <= leaving < len(self._states) and self._place < self._sender.axis.size - 1:
            sends[self._after] = self._leaving(leaving).contiguous().view(-1)
        if 0 <= coming < len(self._states) and self._place > 0:
            receives[self._before] = self._states[coming].numel()
        self._waves.append(Transfers(sends, receives, self._like, "state_hop", self._sender))

    def _leaving(self, block: int) -> Tensor:
        state = self._states[block]
        return state if self._alone else state + apply(self._transition, self._arrived[block])

    def _take(self) -> None:
        """Wait for what the last wave brings."""
        received = self._waves[-1].wait()
        if self._before in received:
            self._arrived.append(received[self._before].view(self._states[len(self._arrived)].shape))


@dataclass(frozen=True)
class Gathered:
    """``allgather``.

    Attributes:
        forgetful: for every rank whether a document starts in its stretch, so that no state passes it.
        known: every rank's transition ``[P, ...]``, where this rank can tell; then none is sent.
        nothing_decays: transitions are all identity.
    """

    axis: Axis
    forgetful: tuple[bool, ...]
    known: Tensor | None
    nothing_decays: bool

    @property
    def first(self) -> bool:
        """Whether nothing comes before this rank."""
        return self.axis.rank == 0

    def forward(self, transition: Tensor | None, state: Tensor) -> Arriving:
        """See `StateExchange`."""
        sent = transition if self.known is None and not self.nothing_decays else None
        return _Everyone(sent, state, self.known, Sender(self.axis, METHOD, "forward"), self.forgetful)

    def backward(self, transition: Tensor | None, gradient: Tensor, kept: Tensor | None) -> Arriving:
        """See `StateExchange`."""
        return _Everyone(None, gradient, kept, Sender(self.axis, METHOD, "backward"), self.forgetful)


class _Everyone:
    """One all-gather of summaries, and the sum over those before this rank in the direction of the pass."""

    def __init__(
        self,
        sent: Tensor | None,
        state: Tensor,
        transitions: Tensor | None,
        sender: Sender,
        forgetful: tuple[bool, ...],
    ) -> None:
        self._sent, self._state, self.kept, self._sender = sent, state, transitions, sender
        self._forgetful = forgetful
        parts = [state] if sent is None else [state, sent]
        self._collection = Collection(torch.cat([part.reshape(-1) for part in parts]), sender)

    def wait(self) -> Tensor | None:
        """See `Arriving`."""
        axis, shape = self._sender.axis, self._state.shape
        states = []
        transitions = []
        for part in self._collection.wait():
            states.append(part[: prod(shape)].view(shape))
            if self._sent is not None:
                transitions.append(part[prod(shape) :].view(self._sent.shape))
        if self._sent is not None:
            self.kept = torch.stack(transitions)
        backwards = self._sender.phase == "backward"
        before = range(axis.size - 1, axis.rank, -1) if backwards else range(axis.rank)
        total: Tensor | None = None
        for rank in before:
            transition = None if self.kept is None else self.kept[rank]
            if total is None or self._forgetful[rank]:
                # A view would keep what all ranks sent.
                total = states[rank].clone()
            else:
                total = states[rank] + apply(transposed(transition) if backwards else transition, total)
        return total


def state_exchange(
    name: str, axis: Axis, forgetful: tuple[bool, ...], known: Tensor | None, nothing_decays: bool
) -> StateExchange:
    """The exchange of a concrete name on the ranks of an axis.

    Args:
        name: one of `EXCHANGES`.
        forgetful, known, nothing_decays: see `Gathered`.
    """
    if axis.size == 1:
        return Alone()
    if name == "allgather":
        return Gathered(axis, forgetful, known, nothing_decays)
    return Chain(axis, forgetful[axis.rank], scanned=name == "scan")
