"""An all-to-all along routes that is in flight while others compute; autograd is the caller's business."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dsp_plugin.comm.routes import Packed, Route, assembled
from dsp_plugin.comm.wire import Exchange, Sender


class Flight:
    """Tensors on their way along routes, all of them in one collective, from construction until `wait`.

    Between two ranks or more, which all start the same flights in the same order.

    Args:
        packed: the tensors, as `routes.pack` makes it; its buffer must stay unwritten until `wait` returns, also where
            it is one of the tensors.
        routes: those that they were packed for.
    """

    def __init__(self, packed: Packed, routes: Sequence[Route], sender: Sender) -> None:
        self._routes = routes
        self._received = packed.buffer.new_empty(sum(packed.receive_counts))
        self._blocks = packed.blocks(self._received)
        self._exchange: Exchange | None = Exchange(
            packed.buffer[None],
            self._received[None],
            packed.send_counts,
            packed.receive_counts,
            sender,
            packed.whole,
        )

    def wait(self) -> list[list[Tensor]]:
        """By tensor, what came from each rank, to be put where `routes.lay` puts it. May be called again."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.wait()
        return self._blocks

    def land(self) -> list[Tensor]:
        """The tensors, local along ``scatter_dim`` and whole along ``gather_dim``, as by `all_to_all`."""
        return assembled(self._received, self.wait(), self._routes)
