"""Attention whose heads are exchanged in rounds, each of them in flight while another one computes (arXiv 2602.21196).

    for every round:  start to gather q, k and v of the heads of the next round
                      attend to those of this one
                      start to send their output back

The backward pass goes through the rounds from the last to the first, gathers gradients of the output and sends those of
q, k and v back the same way. What a pass sends adds up to what it would in one round: keys and values that several
rounds need travel once, and their gradients are added up in fp32 first.

What is alive, in bytes of one rank. X is ``B n H D e`` of its own query shard, and 1/C of it what a round has of it:

- While a round computes: its gathered tensors, the buffers in which those of the next one travel, and those of the one
  before on their way back. All of this falls by C.
- Until the backward pass: q, k, v, out and the log-sum-exp as gathered, of all rounds. That is as much as any attention
  keeps, for the gathered heads of a round take the place of as much of q, k and v that the caller can free; to gather
  them again instead would send them twice. Where nothing is to be differentiated, as in the first run of a checkpointed
  stretch, a round leaves its output only.
- In the backward pass a round frees what it kept when it is done, and leaves its gradients of q, k and v in the buffer
  that they came in; they are put together at the end.

Every round has a node of its own in the graph, so that it can be freed by itself; the nodes hand each other an empty
token, which puts them in order, and share a `_Pass`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dsp_plugin.comm.flight import Flight
from dsp_plugin.comm.plan import pack
from dsp_plugin.comm.routes import Route
from dsp_plugin.comm.wire import Sender
from dsp_plugin.derivatives import once_differentiable, refuse_transforms
from dsp_plugin.kernels.call import AttentionCall
from dsp_plugin.kernels.merge import accumulation_dtype
from dsp_plugin.methods.head_exchange import HeadExchange
from dsp_plugin.methods.head_rounds import HeadRounds


class Inside(Protocol):
    """Attention of gathered heads, without autograd; shapes as for `kernels.softmax`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """``(out, lse)``, ``out`` in the dtype of q."""

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: AttentionCall
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)``, in that dtype or a wider one."""


def attention_in_rounds(
    q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, rounds: HeadRounds, exchange: HeadExchange, inside: Inside
) -> Tensor:
    """The attention of all heads, between two ranks or more.

    Args:
        q: ``[B, n, H, D]``; k: ``[B, n, K, D]``; v: ``[B, n, K, Dv]``, this rank's shards.
        call: of all H heads.
        inside: attends to the gathered heads of a round.

    Returns:
        ``[B, n, H, Dv]``.
    """
    refuse_transforms("attention", q, k, v)
    shared = _Pass((q.shape, k.shape, v.shape), call, rounds, exchange, inside)
    token: Tensor = _Enter.apply(shared, q, k, v)
    for index in range(rounds.count):
        token = _Round.apply(shared, index, token)
    out: Tensor = _Leave.apply(shared, token)
    return out


class _Pass:
    """What the nodes of one call share: what it computes, and what is on its way in the direction it is run."""

    def __init__(
        self,
        shapes: tuple[torch.Size, ...],
        call: AttentionCall,
        rounds: HeadRounds,
        exchange: HeadExchange,
        inside: Inside,
    ) -> None:
        rank = exchange.axis.rank
        self.shapes = shapes
        self.inside, self.rounds = inside, rounds
        self.calls = [
            call.narrow(rounds.queries[index][rank], rounds.queries_per_key(index, rank))
            for index in range(rounds.count)
        ]
        self.sender = Sender(exchange.axis, exchange.method, "forward")
        self.routes = [_routes(exchange, rounds, index) for index in range(rounds.count)]
        self.going: _Forward | None = None
        self.returning: _Backward | None = None

    def start(self, tensors: Sequence[Tensor], routes: Sequence[Route]) -> Flight:
        """Tensors of the forward pass, of which there may be more than routes, on their way."""
        return Flight(pack(tensors[: len(routes)], routes, self.sender.axis), routes, self.sender)


def _routes(exchange: HeadExchange, rounds: HeadRounds, index: int) -> tuple[Route, ...]:
    """Of q, and of k and v where any rank gets some in this round."""
    queries, arriving = exchange.route(rounds.queries[index]), rounds.arriving[index]
    return (queries, *[exchange.route(arriving)] * 2) if any(arriving) else (queries,)


class _Forward:
    """The state of a forward pass between its nodes, which are handed ``shared`` and hold it.

    It must not hold it itself: where recomputation stops in the middle, only a garbage collector would free a circle.
    """

    def __init__(self, shared: _Pass, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._local: tuple[Tensor, ...] = (q, k, v)
        self._out: Tensor | None = None
        self._shape = [*q.shape[:-1], v.shape[-1]]
        self._kv: list[Tensor] = []
        self._computed: Tensor | None = None
        self._back: Flight | None = None
        self._next: Flight | None = self._gather(shared, 0)

    def _gather(self, shared: _Pass, index: int) -> Flight | None:
        if index == len(shared.routes):
            self._local = ()
            return None
        return shared.start(self._local, shared.routes[index])

    def attend(self, shared: _Pass, index: int) -> tuple[Tensor, ...]:
        """Round ``index``: its gathered q, k, v, out and lse."""
        flight, self._next = self._next, None
        assert flight is not None
        self._send_back(shared, index - 1)
        q, *kv = flight.land()
        if shared.rounds.arriving[index][shared.sender.axis.rank]:
            self._kv = kv
        # What is done with is free before the buffers of the next are made, which needs no longer than this computes.
        del flight, kv
        self._next = self._gather(shared, index + 1)
        k, v = self._kv
        self._computed, lse = shared.inside.forward(q, k, v, shared.calls[index])
        return q, k, v, self._computed, lse

    def _send_back(self, shared: _Pass, index: int) -> None:
        """Only once the round's node has saved what it needs: recomputation may stop there."""
        if index < 0:
            return
        out, self._computed = self._computed, None
        assert out is not None
        self._land()
        self._back = shared.start((out,), (shared.routes[index][0].inverse(),))

    def _land(self) -> None:
        flight, self._back = self._back, None
        if flight is None:
            return
        arrived = flight.wait()
        if self._out is None:
            self._out = arrived.new_empty(self._shape)
        flight.lay((self._out,))

    def finish(self, shared: _Pass) -> Tensor:
        """The output of all rounds."""
        self._send_back(shared, len(shared.routes) - 1)
        self._land()
        assert self._out is not None
        return self._out


class _Backward:
    """The state of a backward pass between its nodes, likewise."""

    def __init__(self, shared: _Pass, dout: Tensor) -> None:
        self._sender = shared.sender.backward()
        self._dtype, self._device = dout.dtype, dout.device
        # Packed at once, for then its memory is free before the last round, and round by round after that.
        self._leaving = [pack((dout,), of_round[:1], self._sender.axis) for of_round in shared.routes]
        self._shared_kv: list[Tensor] = []
        self._back: list[Flight] = []
        self._next = self._gather(shared, len(shared.routes) - 1)

    def _gather(self, shared: _Pass, index: int) -> Flight | None:
        return Flight(self._leaving.pop(), shared.routes[index][:1], self._sender) if self._leaving else None

    def differentiate(
        self, shared: _Pass, index: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> None:
        """Round ``index``; rounds come from the last to the first."""
        flight, self._next = self._next, None
        assert flight is not None
        (dout,) = flight.land()
        del flight
        self._next = self._gather(shared, index - 1)
        dq, *dkv = shared.inside.backward(dout, q, k, v, out, lse, shared.calls[index])
        del dout
        if self._back:
            # Frees what was sent, and keeps what came.
            self._back[-1].wait()
        home = self._of_kv(dkv, last=bool(shared.rounds.arriving[index][self._sender.axis.rank]))
        routes = [route.inverse() for route in shared.routes[index]]
        packed = pack([dq.to(q.dtype), *(x.to(k.dtype) for x in home)][: len(routes)], routes, self._sender.axis)
        # Before there is room for what arrives.
        del dq, home
        self._back.append(Flight(packed, routes, self._sender))

    def _of_kv(self, found: list[Tensor], last: bool) -> list[Tensor]:
        """The gradients of keys and values that go home with this round; takes all that was ``found``.

        Args:
            last: no round to come uses the same keys.
        """
        for which, total in enumerate(self._shared_kv):
            wide = accumulation_dtype(total.dtype)
            found[which] = self._shared_kv[which] = total.to(wide).add_(found[which])
        home = list(found)
        found.clear()
        if last:
            self._shared_kv = []
            return home
        self._shared_kv = home
        return [x[:, :, :0] for x in home]

    def finish(self, shared: _Pass) -> tuple[Tensor, ...]:
        """The gradients of q, k and v."""
        for flight in self._back:
            flight.wait()
        flights, self._back = self._back, []
        part = shared.rounds.part
        # Several ranks have a part of the gradient of a key/value head that all of them needed.
        add = (False, *[sum(map(len, part.keys)) > part.kv_heads] * 2)
        wide = accumulation_dtype(self._dtype)
        totals = [
            torch.zeros(shape, dtype=wide, device=self._device)
            if adding
            else torch.empty(shape, dtype=self._dtype, device=self._device)
            for shape, adding in zip(shared.shapes, add, strict=True)
        ]
        for flight in flights:
            flight.lay(totals[: flight.tensors], add[: flight.tensors])
        return tuple(total.to(self._dtype) for total in totals)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shared: _Pass, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.shared = shared
        shared.going = _Forward(shared, q, k, v)
        return q.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _token: Tensor) -> tuple[Tensor | None, ...]:
        returning, ctx.shared.returning = ctx.shared.returning, None
        return None, *returning.finish(ctx.shared)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shared: _Pass, index: int, token: Tensor) -> Tensor:
        ctx.shared, ctx.index = shared, index
        assert shared.going is not None
        ctx.save_for_backward(*shared.going.attend(shared, index))
        return token.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, token: Tensor) -> tuple[Tensor | None, ...]:
        ctx.shared.returning.differentiate(ctx.shared, ctx.index, *ctx.saved_tensors)
        return None, None, token


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shared: _Pass, token: Tensor) -> Tensor:
        ctx.shared = shared
        going, shared.going = shared.going, None
        assert going is not None
        return going.finish(shared)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        ctx.shared.returning = _Backward(ctx.shared, dout)
        return None, dout.new_empty(0)
