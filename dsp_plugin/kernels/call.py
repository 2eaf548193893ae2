"""An attention on its way to a kernel: checked before anything is sent, and narrowed to what a rank or block has of it.

`prepare` checks an `AttentionSpec` against tensors and chooses the kernel: an `AttentionCall`, which is narrowed where
a rank holds some of the heads, and gives every block of the mask its `BlockSpec`, which is all that a kernel gets to
see beside its tensors. A new modifier of attention is a field of the spec, and work for the kernels that know it;
nothing in between names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Self

from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.kernels.blocks import Block
from dsp_plugin.kernels.kernel import BlockSpec, Kernel
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.kernels.table import choose


@dataclass(frozen=True)
class AttentionCall:
    """A spec that was checked against tensors, with the kernel that serves them; made by `prepare`.

    Attributes:
        spec: as narrowed to the heads at hand.
        kernel: the chosen kernel.
        scale: factor on the scores.
    """

    spec: AttentionSpec
    kernel: Kernel
    scale: float

    def narrow(self, heads: range, q_per_kv: tuple[int, ...] | None = None) -> Self:
        """See `AttentionSpec.narrow`."""
        return replace(self, spec=self.spec.narrow(heads, q_per_kv))

    def within_documents(self) -> Self:
        """The same where all blocks are cut at document borders already."""
        return replace(self, spec=replace(self.spec, mask=replace(self.spec.mask, cu_seqlens=None)))

    def by_rows(self, batch: int) -> Iterator[tuple[Self, slice]]:
        """The call of each run of batch rows that are packed alike, and which rows these are."""
        first = 0
        for count, part in self.spec.by_rows(batch):
            yield replace(self, spec=part), slice(first, first + count)
            first += count

    def evenly(self) -> Iterator[tuple[Self, slice, slice]]:
        """The call cut into ones whose kv heads serve equally many query heads, with the query and kv heads of each.

        Kernels share heads evenly. Repeating kv heads instead costs memory, and a rounding of dk and dv per query head.
        """
        assert self.spec.q_per_kv is not None
        first_q = first_kv = 0
        for served, run in groupby(self.spec.q_per_kv):
            kv = slice(first_kv, first_kv + len(list(run)))
            heads = slice(first_q, first_q + served * (kv.stop - kv.start))
            if served:
                yield self.narrow(range(heads.start, heads.stop)), heads, kv
            first_q, first_kv = heads.stop, kv.stop

    @property
    def is_even(self) -> bool:
        """Whether every kv head serves as many query heads, which is what kernels do."""
        served = self.spec.q_per_kv
        return served is None or (len(set(served)) == 1 and 0 not in served)

    def of_block(self, block: Block, q_positions: range, k_positions: range) -> BlockSpec:
        """What a kernel computes over a block of the mask.

        Args:
            q_positions, k_positions: global positions of the queries and keys that the block is cut from.
        """
        dropout = self.spec.dropout(q_positions, k_positions)
        return BlockSpec(block.band, self.scale, None if dropout is None else dropout.narrow(block.q, block.k))


def prepare(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> AttentionCall:
    """Checks an attention against its tensors and chooses a kernel.

    Args:
        q: ``[B, n, H, D]``; k: ``[B, m, K, D]``; v: ``[B, m, K, Dv]``. Nothing depends on how many tokens they hold.

    Raises:
        SequenceParallelConfigError: heads or the kernel's name are illegal.
        UnsupportedError: mixed dtypes, or the forced kernel cannot serve such tensors.
    """
    assert q.dim() == k.dim() == v.dim() == 4
    assert q.shape[0] == k.shape[0]
    assert q.shape[3] == k.shape[3]
    assert k.shape[:3] == v.shape[:3]
    if not q.dtype == k.dtype == v.dtype:
        raise UnsupportedError(
            setting="attention dtypes",
            value=f"q {q.dtype}, k {k.dtype}, v {v.dtype}",
            why="one kernel call reads all three in one dtype",
            remedy="cast them alike; rotary embeddings computed in fp32 are the usual cause",
        )
    _check_heads(q.shape[2], k.shape[2], spec.q_per_kv)
    kernel = choose(spec, q.device, q.dtype, q.shape[-1], v.shape[-1])
    return AttentionCall(spec, kernel, q.shape[-1] ** -0.5 if spec.scale is None else spec.scale)


def _check_heads(heads: int, kv_heads: int, q_per_kv: tuple[int, ...] | None) -> None:
    if q_per_kv is None:
        if heads != 0 and (kv_heads == 0 or heads % kv_heads):
            raise SequenceParallelConfigError(
                setting="heads",
                value=f"{heads} query heads and {kv_heads} kv heads",
                why=f"{heads} is not a multiple of {kv_heads}, so the heads cannot be shared evenly",
                remedy="pass q_per_kv, the number of query heads that each kv head serves",
            )
    elif len(q_per_kv) != kv_heads or sum(q_per_kv) != heads or min(q_per_kv, default=0) < 0:
        raise SequenceParallelConfigError(
            setting="q_per_kv",
            value=q_per_kv,
            why=f"it must have one count for each of {kv_heads} kv heads, adding up to {heads} query heads; "
            f"it has {len(q_per_kv)} adding up to {sum(q_per_kv)}",
            remedy="count the local query heads of each local kv head",
        )
