"""Dense attention masks, of which Megatron's data loaders make one per batch, as what they say: causal, in documents.

A mask that keeps the documents of a packed sequence apart (``--reset-attention-mask``) is causal attention inside each
of them, which softmax methods compute from the borders. Anything else that it hides is refused.
"""

from __future__ import annotations

import sys
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
# What the first mask of a kind was read as: without documents, later ones need not be waited for.
_whole: dict[bool, bool] = {}
# The last mask that was not waited for: raises where it turns out to hide other tokens.
_unread: dict[bool, _Unread] = {}
# Elements of a tile in which a mask is compared with what it should be.
_TILE = 2**24


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
    if causal in _unread:
        _unread.pop(causal).check()
    groups = None if state is None else state.groups
    assert state is None or groups is not None, "model parallelism was destroyed under a living model"
    positions = layout.position_ids(0 if groups is None else groups.sp.rank, attention_mask.device)
    fits, starts = _starts(attention_mask, causal, positions, layout.length)
    # One flag before the starts, so that all ranks come to one verdict.
    mine = torch.cat([fits.to(starts.dtype).reshape(1), starts])
    parts = [mine]
    if groups is not None:
        parts = [torch.empty_like(mine) for _ in range(groups.sp.size)]
        dist.all_gather(parts, mine, group=groups.sp.group)
    whole = layout.unshard([part[1:] for part in parts], 0) if groups is not None else mine[1:]
    columns = torch.arange(layout.length, device=mine.device)
    # A document's tokens start where its first does.
    first = torch.where(whole == columns, columns, 0).cummax(0).values
    sound = (whole == first).all() & torch.stack([part[0] for part in parts]).all()
    borders: Borders = None
    if mine.is_cuda and _whole.get(causal, False) and _one_document_is_said():
        _unread[causal] = _Unread(sound & (whole == 0).all(), _refusal(attention_mask, causal, layout))
    else:
        borders = _borders(torch.cat([sound.to(whole.dtype).reshape(1), whole]).tolist())
        if borders == ():
            raise _refusal(attention_mask, causal, layout)
        _whole[causal] = borders is None
    _read[causal] = (weakref.ref(attention_mask), borders)
    return borders


def _borders(read: list[int]) -> Borders:
    """Of a verdict, and of where the document of every token starts; empty where the verdict is no."""
    sound, *starts = read
    if not sound:
        return ()
    documents = [index for index, start in enumerate(starts) if index == start]
    return (*documents, len(starts)) if len(documents) > 1 else None


def _one_document_is_said() -> bool:
    """Whether Megatron's own arguments say that its masks keep no documents apart."""
    arguments = getattr(sys.modules.get("megatron.training.global_vars"), "_GLOBAL_ARGS", None)
    return arguments is not None and not getattr(arguments, "reset_attention_mask", True)


class _Unread:
    """A verdict on its way to the host, which nobody waits for: it is read when the next mask comes.

    Args:
        sound: bool, on the device.
        refusal: what to raise where it is false.
    """

    def __init__(self, sound: Tensor, refusal: UnsupportedError) -> None:
        self._refusal = refusal
        self._sound = torch.empty(sound.shape, dtype=sound.dtype, pin_memory=True)
        self._sound.copy_(sound, non_blocking=True)
        self._read = torch.cuda.current_stream(sound.device).record_event()

    def check(self) -> None:
        """Raise what there is to raise: on all ranks, as the verdict is one of all."""
        # A batch has passed since.
        if not self._read.query():
            self._read.synchronize()
        if not self._sound.item():
            raise self._refusal


def _starts(attention_mask: Tensor, causal: bool, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Whether the mask says nothing else, bool, and where the document of each of this rank's tokens starts, int64."""
    no = torch.zeros((), dtype=torch.bool, device=positions.device)
    if attention_mask.shape[-1] != length or attention_mask.shape[-2] not in (length, len(positions)):
        return no, torch.zeros_like(positions)
    rows = attention_mask.reshape(-1, *attention_mask.shape[-2:])
    columns = torch.arange(length, device=rows.device)
    all_rows, fits, found = rows.shape[-2] != len(positions), ~no, []
    # In tiles: nothing else is as large as the mask.
    tokens = max(1, _TILE // max(1, length * len(rows)))
    for place in range(0, len(positions), tokens):
        of = positions[place : place + tokens]
        tile = rows.index_select(-2, of) if all_rows else rows.narrow(-2, place, len(of))
        if not causal:
            fits = fits & ~tile.any()
            found.append(torch.zeros_like(of))
            continue
        # A bool has no argmin on CUDA, and the same bytes have.
        starts = tile[0].view(torch.uint8).argmin(-1)
        hidden = (columns > of[:, None]) | (columns < starts[:, None])
        fits = fits & (tile == hidden).all()
        found.append(starts)
    return fits, torch.cat(found)


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
