"""Dense attention masks, of which Megatron's data loaders make one per batch, as what they say: causal, in documents.

A mask that keeps the documents of a packed sequence apart (``--reset-attention-mask``) is causal attention inside each
of them, which softmax methods compute from the borders. Anything else that it hides is refused.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import Tensor

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.layout import Layout
from dsp_plugin.patches.megatron.state import MegatronState

Borders = tuple[int, ...] | None

# The mask read last and its borders, one for causal and one for full attention: every layer asks for the same one.
_read: dict[bool, tuple[weakref.ref[Tensor], Borders]] = {}


def check_mask(attention_mask: Tensor, causal: bool, layout: Layout, state: MegatronState | None) -> None:
    """Raises on every sequence rank if the dense mask hides more than the future; see `document_borders`.

    Raises:
        UnsupportedError: it hides other tokens, documents included.
    """
    if document_borders(attention_mask, causal, layout, state) is not None:
        raise _refusal(attention_mask, causal, layout)


def document_borders(attention_mask: Tensor, causal: bool, layout: Layout, state: MegatronState | None) -> Borders:
    """The documents that a dense mask keeps apart; one small integer a token travels per mask.

    Args:
        attention_mask: True where hidden, ``[b, 1, rows, L]`` with the rows of this rank or of all.
        causal: whether the mask type is causal; a full one may hide nothing.
        state: of the ranks that share the sequence; None where it is whole.

    Returns:
        ``(0, end of the first document, ..., L)``; None where there is one document only.

    Raises:
        UnsupportedError: it hides other tokens, or not the same in every sample. On every rank.
    """
    seen = _read.get(causal)
    if seen is not None and seen[0]() is attention_mask:
        return seen[1]
    groups = None if state is None else state.groups
    assert state is None or groups is not None, "model parallelism was destroyed under a living model"
    positions = layout.position_ids(0 if groups is None else groups.sp.rank, attention_mask.device)
    starts = _starts(attention_mask, causal, positions, layout.length)
    # One flag before the starts, so that all ranks come to one verdict.
    mine = torch.cat([torch.full_like(positions[:1], starts is not None), positions if starts is None else starts])
    parts = [mine]
    if groups is not None:
        parts = [torch.empty_like(mine) for _ in range(groups.sp.size)]
        dist.all_gather(parts, mine, group=groups.sp.group)
    whole = layout.unshard([part[1:] for part in parts], 0) if groups is not None else mine[1:]
    columns = torch.arange(layout.length, device=mine.device)
    first = whole == columns
    # A document's tokens start where its first does.
    same = torch.equal(whole, torch.where(first, columns, 0).cummax(0).values)
    if not same or not all(bool(part[0]) for part in parts):
        raise _refusal(attention_mask, causal, layout)
    documents = columns[first].tolist()
    borders = (*documents, layout.length) if len(documents) > 1 else None
    _read[causal] = (weakref.ref(attention_mask), borders)
    return borders


def _starts(attention_mask: Tensor, causal: bool, positions: Tensor, length: int) -> Tensor | None:
    """Where the document of each of this rank's tokens starts, ``[n]`` int64; None if the mask says anything else."""
    if attention_mask.shape[-1] != length or attention_mask.shape[-2] not in (length, len(positions)):
        return None
    rows = attention_mask
    if rows.shape[-2] != len(positions):
        rows = rows.index_select(-2, positions)
    rows = rows.reshape(-1, len(positions), length)
    columns = torch.arange(length, device=rows.device)
    if not causal:
        return None if bool(rows.any()) else torch.zeros_like(positions)
    starts = (~rows[0]).int().argmax(-1)
    hidden = (columns > positions[:, None]) | (columns < starts[:, None])
    return starts if bool((rows == hidden).all()) else None


def _refusal(attention_mask: Tensor, causal: bool, layout: Layout) -> UnsupportedError:
    return UnsupportedError(
        setting="attention_mask",
        value=tuple(attention_mask.shape),
        why=f"it hides other tokens than {'a causal mask' if causal else 'none'} over {layout.length} tokens, as "
        "with --reset-attention-mask or padded batches. Softmax methods take documents if all samples of a micro-batch "
        "have the same; linear attention takes none",
        remedy="set --micro-batch-size 1, or drop --reset-attention-mask, or --create-attention-mask-in-dataloader "
        "where the mask is not needed",
    )
