"""Tokens from the left neighbour: what a short convolution over a sharded sequence needs of the ranks before it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.relayout import relayout
from dsp_plugin.comm.wire import Sender, Transfers
from dsp_plugin.derivatives import refuse_transforms
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.kernels import convolution
from dsp_plugin.layout import Layout
from dsp_plugin.mask import document_starts
from dsp_plugin.methods.inputs import check_length
from dsp_plugin.methods.method import WireBytes
from dsp_plugin.training.recompute import on_tape


def left_halo(x_BnC: Tensor, tokens: int, *, layout: Layout, axis: Axis, method: str = "lasp") -> Tensor:
    """The ``tokens`` tokens before this rank's first one, from as many ranks to the left as it takes.

    One round of point-to-point transfers, in which every rank takes part; the backward pass sends the gradients home,
    where they are added up. Bytes: see `halo_bytes`.

    Args:
        x_BnC: this rank's tokens ``[B, n, C]``.
        tokens: how many; more than a shard holds is fine.
        layout: contiguous, of any sizes.
        axis: the ranks of the layout.
        method: the name for the ledger.

    Returns:
        ``[B, tokens, C]``: zeros where the sequence has not begun, and on a rank without tokens, which needs none.

    Raises:
        SequenceParallelConfigError: the layout is not contiguous, or ``x_BnC`` is not this rank's shard.
    """
    if layout.kind != "contiguous":
        raise SequenceParallelConfigError(
            setting="layout",
            value=layout.kind,
            why="a halo is of the ranks to the left, which hold the tokens before only when each rank holds one run",
            remedy="use layout contiguous, or convert with comm.relayout",
        )
    check_length(x_BnC, f"x {tuple(x_BnC.shape)}", layout, axis)
    if axis.size == 1 or tokens == 0:
        return x_BnC.new_zeros(x_BnC.shape[0], tokens, x_BnC.shape[2])
    refuse_transforms("a halo", x_BnC)
    tail = x_BnC[:, max(x_BnC.shape[1] - tokens, 0) :]
    return _LeftHalo.apply(tail, tokens, layout, Sender(axis, method, "forward"))


def halo_bytes(layout: Layout, rank: int, tokens: int, per_token_bytes: int) -> WireBytes:
    """Bytes leaving ``rank``: forward what later ranks need of its tokens, backward the gradients of what it needs."""
    sent = sum(len(run) for run in _to_send(layout, rank, tokens).values())
    received = sum(len(run) for run in _to_receive(layout, rank, tokens).values())
    return WireBytes(sent * per_token_bytes, received * per_token_bytes)


def convolve(
    x_BnC: Tensor,
    weight_CW: Tensor,
    bias_C: Tensor | None = None,
    *,
    groups: SequenceParallelGroups,
    layout: Layout,
    cu_seqlens: Iterable[int] | Tensor | None = None,
) -> Tensor:
    """`kernels.convolution.short_convolution` of a sharded sequence.

    A halo of W-1 tokens from the left; zigzag and striped shards become contiguous before and go back after.

    Args:
        x_BnC: this rank's tokens ``[B, n, C]`` under ``layout``.
        weight_CW: taps ``[C, W]``, the same on every rank; each gets the part of its gradient that its tokens have.
        bias_C: ``[C]``.
        groups: the lasp axis is used.
        cu_seqlens: document borders in global positions; no tap crosses one.

    Returns:
        ``[B, n, C]``.

    Raises:
        SequenceParallelConfigError: shapes or borders that do not fit.
    """
    axis = groups.lasp
    convolution.check(x_BnC, weight_CW, bias_C)
    starts = document_starts(cu_seqlens, layout.length)
    check_length(x_BnC, f"x {tuple(x_BnC.shape)}", layout, axis)
    if layout.kind != "contiguous":
        runs = Layout("contiguous", layout.length, layout.size)
        (in_order,) = relayout((x_BnC,), 1, layout, runs, axis=axis, method="lasp")
        borders = (0, *starts, layout.length)
        out = convolve(in_order, weight_CW, bias_C, groups=groups, layout=runs, cu_seqlens=borders)
        return relayout((out,), 1, runs, layout, axis=axis, method="lasp")[0]
    # On a tape like attention: a recomputed stretch need not fetch it again.
    halo = on_tape(partial(left_halo, tokens=weight_CW.shape[1] - 1, layout=layout, axis=axis))(x_BnC)
    first = _runs(layout)[axis.rank].start
    return convolution.with_halo(halo, x_BnC, weight_CW, bias_C, first=first, borders=(0, *starts) if starts else None)


def _runs(layout: Layout) -> list[range]:
    """The run of every rank, empty ones too."""
    stops = list(accumulate(layout.sizes))
    return [range(stop - size, stop) for stop, size in zip(stops, layout.sizes, strict=True)]


def _halo(run: range, tokens: int) -> range:
    return range(max(run.start - tokens, 0), run.start) if run else range(0)


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _to_send(layout: Layout, rank: int, tokens: int) -> dict[int, range]:
    """The global positions of ``rank`` that each later rank needs."""
    runs = _runs(layout)
    needs = {peer: _common(runs[rank], _halo(runs[peer], tokens)) for peer in range(rank + 1, layout.size)}
    return {peer: need for peer, need in needs.items() if need}


def _to_receive(layout: Layout, rank: int, tokens: int) -> dict[int, range]:
    """The global positions of each earlier rank that ``rank`` needs."""
    runs = _runs(layout)
    needs = {peer: _common(runs[peer], _halo(runs[rank], tokens)) for peer in range(rank)}
    return {peer: need for peer, need in needs.items() if need}


class _LeftHalo(torch.autograd.Function):
    """Of the last tokens of a shard, at most as many as a halo has."""

    @staticmethod
    def forward(ctx: Any, tail: Tensor, tokens: int, layout: Layout, sender: Sender) -> Tensor:
        ctx.args = tail.shape, tokens, layout, sender.backward()
        run = _runs(layout)[sender.axis.rank]
        sends = {
            peer: _at(tail, run.stop, need).contiguous().view(-1)
            for peer, need in _to_send(layout, sender.axis.rank, tokens).items()
        }
        needs = _to_receive(layout, sender.axis.rank, tokens)
        halo = tail.new_zeros(tail.shape[0], tokens, tail.shape[2])
        for peer, flat in _swap(sends, needs, tail, sender).items():
            piece = _at(halo, run.start, needs[peer])
            piece.copy_(flat.view(piece.shape))
        return halo

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _HaloGiven.apply(grad, *ctx.args), None, None, None


class _HaloGiven(torch.autograd.Function):
    """The gradient of a shard's last tokens from those of the halos they were given to."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, shape: torch.Size, tokens: int, layout: Layout, sender: Sender) -> Tensor:
        ctx.args = tokens, layout, sender
        run = _runs(layout)[sender.axis.rank]
        needs = _to_receive(layout, sender.axis.rank, tokens)
        sends = {peer: _at(grad, run.start, need).contiguous().view(-1) for peer, need in needs.items()}
        gave = _to_send(layout, sender.axis.rank, tokens)
        # Several ranks may have needed the same token: bfloat16 would lose what each of them kept.
        total = grad.new_zeros(shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        for peer, flat in _swap(sends, gave, grad, sender).items():
            piece = _at(total, run.stop, gave[peer])
            piece.add_(flat.view(piece.shape))
        return total.to(grad.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _LeftHalo.apply(grad, *ctx.args), None, None, None, None


def _at(x_BmC: Tensor, stop: int, positions: range) -> Tensor:
    """The tokens at the global ``positions``, of tokens of which the last is at ``stop - 1``."""
    return x_BmC.narrow(1, x_BmC.shape[1] - stop + positions.start, len(positions))


def _swap(sends: dict[int, Tensor], needs: dict[int, range], like_BmC: Tensor, sender: Sender) -> dict[int, Tensor]:
    per_token = like_BmC.shape[0] * like_BmC.shape[2]
    receives = {peer: len(need) * per_token for peer, need in needs.items()}
    return Transfers(sends, receives, like_BmC, "halo", sender).wait()
