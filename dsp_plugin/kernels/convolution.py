"""Short causal depthwise convolution, which linear-attention models put before queries, keys and values.

Shape suffixes: B batch, n tokens, C channels, W width (taps), h tokens of the halo on the left.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.mask import document_starts


def short_convolution(
    x_BnC: Tensor, weight_CW: Tensor, bias_C: Tensor | None = None, *, cu_seqlens: Iterable[int] | Tensor | None = None
) -> Tensor:
    """Every channel by itself: ``out[t] = bias + sum_j weight[W-1-j] * x[t-j]``, with zeros before the sequence.

    This is what models call. A ``TorchFunctionMode`` sees the call with ``func is short_convolution``, and can serve a
    sharded sequence in its place.

    Args:
        x_BnC: the whole sequence ``[B, n, C]``, floating.
        weight_CW: taps ``[C, W]``; the last is that of the token itself.
        bias_C: ``[C]``.
        cu_seqlens: document borders ``(0, ..., n)``; no tap crosses one. All batch rows share them.

    Returns:
        ``[B, n, C]``.

    Raises:
        SequenceParallelConfigError: shapes that do not fit each other, or borders that do not fit the sequence.
    """
    if has_torch_function((x_BnC, weight_CW)):
        return handle_torch_function(
            short_convolution, (x_BnC, weight_CW), x_BnC, weight_CW, bias_C, cu_seqlens=cu_seqlens
        )
    check(x_BnC, weight_CW, bias_C)
    halo = x_BnC.new_zeros(x_BnC.shape[0], weight_CW.shape[1] - 1, x_BnC.shape[2])
    starts = document_starts(cu_seqlens, x_BnC.shape[1])
    return with_halo(halo, x_BnC, weight_CW, bias_C, first=0, borders=(0, *starts) if starts else None)


def with_halo(
    halo_BhC: Tensor,
    x_BnC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None = None,
    *,
    first: int,
    borders: tuple[int, ...] | None = None,
) -> Tensor:
    """`short_convolution` of a run of tokens, given the W-1 tokens before it.

    Args:
        halo_BhC: ``[B, W-1, C]``; zeros where the sequence has not begun.
        x_BnC: the run; it may be empty, and the result is a function of the halo even then, for the sake of gradients.
        first: global position of its first token.
        borders: where documents start, in global positions, 0 first; a last one at L does no harm.
    """
    width, tokens = weight_CW.shape[1], x_BnC.shape[1]
    padded = torch.cat([halo_BhC, x_BnC], 1) if width > 1 else x_BnC
    if borders is None and tokens:
        return F.conv1d(padded.transpose(1, 2), weight_CW.unsqueeze(1), bias_C, groups=x_BnC.shape[2]).transpose(1, 2)

    # As in the convolution above, products are added up in fp32 or wider.
    padded = padded.to(torch.promote_types(x_BnC.dtype, torch.float32))
    into_document_n = _into_document(first, tokens, borders, x_BnC.device)
    out = padded[:, width - 1 :] * weight_CW[:, -1]
    for back in range(1, width):
        term = padded[:, width - 1 - back : width - 1 - back + tokens] * weight_CW[:, -1 - back]
        out = out + term.masked_fill((into_document_n < back).unsqueeze(-1), 0.0)
    if bias_C is not None:
        out = out + bias_C
    return out.to(x_BnC.dtype)


def _into_document(first: int, tokens: int, borders: tuple[int, ...] | None, device: torch.device) -> Tensor:
    """How many tokens of its own document come before each token: int64 ``[n]``."""
    position = torch.arange(first, first + tokens, device=device)
    if borders is None:
        return position
    starts = torch.tensor(borders, dtype=torch.int64, device=device)
    return position - starts[torch.bucketize(position, starts, right=True) - 1]


def check(x_BnC: Tensor, weight_CW: Tensor, bias_C: Tensor | None) -> None:
    """Raise unless the tensors of a convolution fit each other.

    Raises:
        SequenceParallelConfigError: they do not.
    """
    channels = x_BnC.shape[-1]
    if x_BnC.dim() != 3 or weight_CW.dim() != 2 or weight_CW.shape[0] != channels or weight_CW.shape[1] < 1:
        raise SequenceParallelConfigError(
            setting="short convolution weight",
            value=tuple(weight_CW.shape),
            why=f"x [B, n, C] takes a weight [C, W] with W >= 1, and x is {tuple(x_BnC.shape)}",
            remedy="drop the middle dim of an nn.Conv1d weight, and put tokens before channels",
        )
    if bias_C is not None and tuple(bias_C.shape) != (channels,):
        raise SequenceParallelConfigError(
            setting="short convolution bias",
            value=tuple(bias_C.shape),
            why=f"there is one for each of {channels} channels",
            remedy=f"pass a tensor of shape ({channels},), or None",
        )
