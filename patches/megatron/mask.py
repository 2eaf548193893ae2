"""Dense attention masks, of which Megatron's data loaders make one per batch: they must say what the mask type says."""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist
from torch import Tensor

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.layout import Layout
from dsp_plugin.patches.megatron.state import MegatronState

# Masks that a rank has found to say no more, one for causal and one for full attention.
_checked: dict[bool, weakref.ref[Tensor]] = {}


def check_mask(attention_mask: Tensor, causal: bool, layout: Layout, state: MegatronState | None) -> None:
    """Raises on every sequence rank unless the dense mask equals the structured one; one flag travels per mask.

    Args:
        attention_mask: True where hidden, ``[b, 1, rows, L]`` with the rows of this rank or of all.
        state: of the ranks that share the sequence; None where it is whole.

    Raises:
        UnsupportedError: it hides other tokens.
    """
    seen = _checked.get(causal)
    if seen is not None and seen() is attention_mask:
        return
    device, rank = attention_mask.device, 0
    if state is not None:
        assert state.groups is not None
        rank = state.groups.sp.rank
    columns = torch.arange(layout.length, device=device)
    rows = layout.position_ids(rank, device) if attention_mask.shape[-2] != layout.length else columns
    agrees = attention_mask.shape[-2:] == (len(rows), len(columns))
    if agrees:
        hidden = columns > rows[:, None] if causal else torch.zeros((), dtype=torch.bool, device=device)
        agrees = bool((attention_mask == hidden).all())
    if state is not None and state.groups is not None:
        verdict = torch.tensor(int(agrees), device=device)
        dist.all_reduce(verdict, dist.ReduceOp.MIN, group=state.groups.sp.group)
        agrees = bool(verdict.item())
    if not agrees:
        raise UnsupportedError(
            setting="attention_mask",
            value=tuple(attention_mask.shape),
            why=f"it hides other tokens than {'a causal mask' if causal else 'none'} over {layout.length} tokens, as "
            "with --reset-attention-mask or padded batches, and only structured masks are sharded",
            remedy="drop --reset-attention-mask, or --create-attention-mask-in-dataloader where the mask is not needed",
        )
    _checked[causal] = weakref.ref(attention_mask)
