"""How heads go to the ranks that compute them, and what they make of them back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.collectives import all_to_all
from dsp_plugin.comm.routes import Route
from dsp_plugin.methods.head_partition import HeadPartition
from dsp_plugin.methods.inputs import SEQUENCE_DIM

HEAD_DIM = 2


@dataclass(frozen=True)
class HeadExchange:
    """The two all-to-alls around an attention whose ranks hold all tokens of some heads.

    Attributes:
        axis: the ranks that exchange.
        method: for the ledger.
        part: which heads each rank gets.
        tokens: for every rank, where its local tokens stand among the gathered ones; who passes the same object again
            shares what was worked out for it.
    """

    axis: Axis
    method: str
    part: HeadPartition
    tokens: tuple[tuple[range, ...], ...]

    def scatter(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[B, n, all heads, D]`` to ``[B, gathered tokens, own heads, D]``, in one collective."""
        by_key = self.route(self.part.keys)
        routes = (self.route(self.part.queries), by_key, by_key)
        q, k, v = all_to_all((q, k, v), routes, axis=self.axis, method=self.method)
        return q, k, v

    def gather(self, out: Tensor) -> Tensor:
        """``[B, gathered tokens, own heads, Dv]`` back to ``[B, n, all heads, Dv]``."""
        route = self.route(self.part.queries).inverse()
        return all_to_all((out,), (route,), axis=self.axis, method=self.method)[0]

    @property
    def heads(self) -> range:
        """The query heads of this rank."""
        return self.part.queries[self.axis.rank]

    @property
    def q_per_kv(self) -> tuple[int, ...]:
        """How many of this rank's query heads each of its key/value heads serves."""
        return self.part.queries_per_key(self.axis.rank)

    def route(self, heads: tuple[range, ...]) -> Route:
        """Of a tensor of which every rank gets these heads, or none where its run is empty; the same every time."""
        return _route(heads, _Itself(self.tokens))


class _Itself:
    """What is looked up as the object that it is: borders of thousands of documents are too long to be read."""

    def __init__(self, tokens: tuple[tuple[range, ...], ...]) -> None:
        self.tokens = tokens

    def __hash__(self) -> int:
        return id(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self.tokens is other.tokens


@lru_cache(maxsize=256)
def _route(heads: tuple[range, ...], tokens: _Itself) -> Route:
    return Route(HEAD_DIM, SEQUENCE_DIM, tuple((run,) for run in heads), tokens.tokens)
