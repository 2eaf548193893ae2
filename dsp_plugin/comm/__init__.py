"""Communication: autograd collectives over one counted choke point."""

from dsp_plugin.comm.collectives import (
    all_gather,
    all_to_all,
    gather,
    reduce_scatter,
    replicate,
    ring_hop,
    split,
)
from dsp_plugin.comm.ledger import Ledger, LedgerRow, ledger
from dsp_plugin.comm.relayout import relayout
from dsp_plugin.comm.routes import Route

__all__ = [
    "Ledger",
    "LedgerRow",
    "Route",
    "all_gather",
    "all_to_all",
    "gather",
    "ledger",
    "reduce_scatter",
    "relayout",
    "replicate",
    "ring_hop",
    "split",
]
