"""An all-to-all along routes that is in flight while others compute; autograd is the caller's business."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dsp_plugin.comm.by_peer import ByPeer
from dsp_plugin.comm.plan import Packed
from dsp_plugin.comm.routes import Route
from dsp_plugin.comm.wire import Exchange, Sender


class Flight:
    """Tensors on their way along routes, all of them in one collective, from construction until `wait`.

    Between two ranks or more, which all start the same flights in the same order.

    Args:
        packed: the tensors, as `plan.pack` makes it; its buffer must stay unwritten until `wait` returns, also where
            it is one of the tensors.
        routes: those that they were packed for.
    """

    def __init__(self, packed: Packed, routes: Sequence[Route], sender: Sender) -> None:
        plan = packed.plan
        self.tensors = len(routes)
        self._plan = plan
        received, self._room = plan.room(packed.buffer)
        self._exchange: Exchange | None = Exchange(
            packed.buffer, received, plan.send_counts, plan.receive_counts, sender, plan.whole
        )

    def wait(self) -> Tensor:
        """The buffer that has arrived, which only this object can read. May be called again."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.wait()
        return self._room

    def land(self) -> list[Tensor]:
        """The tensors, local along ``scatter_dim`` and whole along ``gather_dim``, as by `all_to_all`."""
        return self._plan.unpack(self.wait())

    def lay(self, totals: Sequence[Tensor], add: Sequence[bool] = ()) -> None:
        """Copy what came to its entries of the later dim, which was gathered, of whole tensors, or add it there.

        Args:
            totals: of the tensors; those that are added to in fp32 or wider.
            add: for every one of them, whether.
        """
        arriving = self._plan.arriving
        assert isinstance(arriving, ByPeer)
        assert self._plan.swapped is None
        arriving.lay(totals, self.wait(), add)
