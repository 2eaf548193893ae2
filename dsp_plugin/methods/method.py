"""What every method declares about itself. Config validation, planner, doctor, verify and tests all read this."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import Layout, LayoutKind
from dsp_plugin.mask import MaskSpec


@dataclass(frozen=True)
class Workload:
    """The shapes of one attention call, or of one pair of stages, before sharding over ``size`` ranks.

    Attributes:
        size: P, the sequence-parallel size.
        heads: H, query heads on one tensor-parallel rank; for linear attention value heads.
        kv_heads: K, key/value heads on one tensor-parallel rank; for linear attention query and key heads.
        head_dim: D, of queries and keys.
        value_dim: of values; ``head_dim`` when None.
        element_size: e, bytes.
        ulysses_size: for USP, U of P = U * R.
        documents: borders of the documents that zigzag cuts one by one, see `Layout`.
        whole_below: of how many tokens a document is cut at least, see `Layout`.
        ring_gradient_dtype: in which gradients of keys and values travel on a ring, ``fp32`` or ``input``.
        grid: for DSP, the sizes of the two dims that it switches between; their product is ``length``.
        decay: for linear attention, one of `kernels.linear.DECAYS`; delta rules with a fixed decay per head count as
            ``gated-delta``.
        exchange: for linear attention, how states travel, one of `state_exchange.EXCHANGES`, or ``auto``.
        gate_size: for linear attention, bytes per element of decays and betas.
        sizes: of the ranks' contiguous shards, where they are not those of an even split.
    """

    size: int
    heads: int
    kv_heads: int
    length: int = 1
    batch: int = 1
    head_dim: int = 64
    value_dim: int | None = None
    element_size: int = 4
    layout: LayoutKind = "contiguous"
    mask: MaskSpec = field(default_factory=MaskSpec)
    grid: tuple[int, int] | None = None
    ulysses_size: int | None = None
    documents: tuple[int, ...] | None = None
    ring_gradient_dtype: Literal["fp32", "input"] = "fp32"
    decay: str = "none"
    exchange: str = "auto"
    gate_size: int = 4
    sizes: tuple[int, ...] | None = None
    whole_below: int = 0

    @property
    def gradient_size(self) -> int:
        """Bytes per element of the gradients of keys and values that travel on a ring."""
        return self.element_size if self.ring_gradient_dtype == "input" else max(self.element_size, 4)

    @property
    def v_dim(self) -> int:
        """Head dim of the values."""
        return self.head_dim if self.value_dim is None else self.value_dim

    def tokens(self) -> Layout:
        """The placement of the sequence on the ranks."""
        return Layout(self.layout, self.length, self.size, self.sizes, self.documents, self.whole_below)


@dataclass(frozen=True)
class Where:
    """Where the tokens of an attention lie.

    Attributes:
        groups: of the ranks that share the sequence.
        layout: which of its tokens each of them holds.
    """

    groups: SequenceParallelGroups
    layout: Layout


class WireBytes(NamedTuple):
    """Bytes leaving one rank."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        name: as the user writes it.
        kind: ``softmax`` and ``linear`` methods replace an attention call; a ``switch`` method moves the sharded dim.
        axes: those of the U x R grid that it spreads over.
        layouts: token orders it accepts, the best first.
        illegal: why it cannot serve a workload, one sentence each with the arithmetic and a remedy; empty if it can.
        wire_bytes: bytes leaving ``rank``, from the formula.
        attention: of softmax methods ``attention(q, k, v, what=AttentionSpec, where=Where)``, of linear ones as
            `lasp.attention`.
        settings: of `SequenceParallelConfig`, those that ``attention`` takes as further keywords of the same names.
    """

    name: str
    kind: Literal["softmax", "linear", "switch"]
    paper: str
    axes: tuple[Literal["ulysses", "ring"], ...]
    layouts: tuple[LayoutKind, ...]
    illegal: Callable[[Workload], list[str]]
    wire_bytes: Callable[[Workload, int], WireBytes]
    attention: Callable[..., Any] | None = None
    settings: tuple[str, ...] = ()
