"""An all-to-all along routes that is in flight while others compute; autograd is the caller's business."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dsp_plugin.comm.routes import Route, assembled, pack
from dsp_plugin.comm.wire import Exchange, Sender


class Flight:
    """Tensors on their way along routes, all of them in one collective, from construction until `wait`.

    Between two ranks or more, which all start the same flights in the same order. A tensor that travels alone and lies
    in rank order already is sent as it lies, and must stay unwritten until `wait` returns.

    Args:
        tensors: of one dtype, each at least as long along its route's ``scatter_dim`` as what the route sends of it.
        routes: one per tensor.
    """

    def __init__(self, tensors: Sequence[Tensor], routes: Sequence[Route], sender: Sender) -> None:
        packed = pack(tensors, routes, sender.axis)
        self._routes = routes
        self._received = tensors[0].new_empty(sum(packed.receive_counts))
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
