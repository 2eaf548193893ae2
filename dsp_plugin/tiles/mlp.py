"""What computes token by token, some tokens at a time: an MLP whose intermediate activations are those of one tile.

The forward pass computes tile by tile and keeps its input alone. The backward pass computes a tile again, takes its
gradients and goes on to the next. Parameters are inputs like any other: each tile's gradients are of stand-ins, summed
in fp32 (fp64 for fp64), and those of the parameters come out once. So hooks on parameters fire once, and no framework
needs to be told. What gathers parameters does so around the call and its backward pass, not around every tile.

The input is kept before anything is computed from it. Where checkpointing runs a stretch of the model again, it stops
at the last tensor that it lacks: a tiled MLP at the end of the stretch is not computed once more before its tiles are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsp_plugin.derivatives import once_differentiable, refuse_transforms
from dsp_plugin.tiles.spec import tiles_of

Compute = Callable[[Tensor], Tensor]

AUTO_MLP_BYTES = 512 << 20
"""What ``"auto"`` lets a tile of an MLP take on a device."""


def tiled(compute: Compute, x: Tensor, holder: nn.Module, *, tiles: int) -> Tensor:
    """``compute`` of every token, in tiles that differ in size by the last one alone. Not for `torch.compile` to trace.

    Args:
        compute: of a tile ``[t, E]``, to ``[t, F]``; of each token by itself, and alike whenever it is called: it draws
            no random numbers. Its parameters are those of ``holder``, which it reads from the modules that hold them.
        x: ``[..., E]``.
        holder: has all the parameters.
        tiles: at most so many, 1 or more; 1 computes as ``compute`` does by itself. More than tokens are one for each.

    Returns:
        ``[..., F]``. Second derivatives, and those of `torch.func`, are refused.

    Raises:
        UnsupportedError: within a transform of `torch.func`.
    """
    refuse_transforms("a tiled MLP", x)
    tokens = x.numel() // max(x.shape[-1], 1)
    size = -(-tokens // tiles)
    if size >= tokens:
        return _shaped(compute(_rows(x)), x)
    slots = _slots(holder)
    if not torch.is_grad_enabled() or not (x.requires_grad or slots):
        return _shaped(_each(compute, _rows(x), size), x)
    if not x.requires_grad:
        # Else nothing would be kept of it.
        x = x.detach().requires_grad_()
    kept = _Keep.apply(x)
    call = _Call(compute, kept.grad_fn, slots, size, _autocast_of(x.device.type))
    return _Tiled.apply(kept, call, *slots)


def tile_count(tokens: int, bytes_per_token: int, budget: int) -> int:
    """The fewest tiles of which each takes at most ``budget`` bytes, as far as one token alone does not take more.

    Args:
        bytes_per_token: see `bytes_of_token`.
    """
    return max(-(-tokens // max(budget // max(bytes_per_token, 1), 1)), 1)


def bytes_of_token(widths: Sequence[int], element_size: int) -> int:
    """What a token of a tile takes where most of it is alive, in the tile's backward pass.

    Args:
        widths: features of what each projection of the MLP returns, such as I, I and E.
        element_size: bytes of one.
    """
    # Of a gated MLP at its peak: gate, up, activation and the gradients of three, 6 I of 2 I + E widths.
    return 3 * sum(widths) * element_size


@dataclass(frozen=True)
class _Call:
    """What the backward pass needs beside gradients.

    Attributes:
        kept: the node that has the input; what it saved may have to be computed again.
        slots: by parameter, the modules that hold it and the names by which they do.
        autocast: makes the forward pass's context.
    """

    compute: Compute
    kept: Any
    slots: dict[nn.Parameter, list[tuple[nn.Module, str]]]
    size: int
    autocast: Callable[[], AbstractContextManager[Any]]


class _Keep(torch.autograd.Function):
    """Saves the input, where hooks on saved tensors see it before anything is computed from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *parameters: Tensor) -> Tensor:
        ctx.call = call
        return _shaped(_each(call.compute, _rows(x), call.size), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        (x,) = call.kept.saved_tensors
        rows, of_out = _rows(x.detach()), _rows(grad)
        of_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        sums = {
            parameter: _Sum(parameter)
            for parameter, needed in zip(call.slots, ctx.needs_input_grad[2:], strict=True)
            if needed
        }
        with torch.enable_grad(), call.autocast(), _standing_in(call.slots, sums):
            for tile in tiles_of(len(rows), call.size):
                rows_t = rows[tile].requires_grad_(of_rows is not None)
                inputs = [found.alias for found in sums.values()]
                inputs += [rows_t] if of_rows is not None else []
                torch.autograd.backward(call.compute(rows_t), of_out[tile], inputs=inputs)
                if of_rows is not None and rows_t.grad is not None:
                    of_rows[tile] = rows_t.grad
        return (
            None if of_rows is None else of_rows.view(x.shape),
            None,
            *(sums[parameter].taken() if parameter in sums else None for parameter in call.slots),
        )


class _Sum:
    """The gradient of one parameter, as tiles add to it.

    Attributes:
        alias: stands in for the parameter where tiles are computed, without its hooks.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.alias = parameter.detach().requires_grad_()
        self._wide = torch.promote_types(parameter.dtype, torch.float32)
        self._sum: Tensor | None = None
        if self._wide != parameter.dtype:
            # While only the parameter's own gradient of this tile is there, not those of all parameters.
            self.alias.register_post_accumulate_grad_hook(self._add)

    def _add(self, alias: Tensor) -> None:
        found, alias.grad = alias.grad, None
        assert found is not None
        if self._sum is None:
            self._sum = found.to(self._wide)
        else:
            self._sum += found

    def taken(self) -> Tensor | None:
        """The sum in the parameter's dtype; None where no tile used the parameter. Nothing is left here."""
        alias, found = self.alias, self._sum
        found = alias.grad if found is None else found
        # Its hook holds this object: in a circle, what frameworks free of a parameter would not be free.
        del self.alias, self._sum
        return None if found is None else found.to(alias.dtype)


def _each(compute: Compute, rows: Tensor, size: int) -> Tensor:
    out: Tensor | None = None
    for tile in tiles_of(len(rows), size):
        found = compute(rows[tile])
        if out is None:
            out = found.new_empty(len(rows), *found.shape[1:])
        out[tile] = found
    assert out is not None
    if not torch.is_grad_enabled() and torch.is_autocast_enabled(rows.device.type):
        # Nobody who needs a graph may get weights that were cast without one.
        torch.clear_autocast_cache()
    return out


def _slots(holder: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Where the parameters are that learn."""
    slots: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in holder.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                slots.setdefault(parameter, []).append((module, name))
    return slots


@contextmanager
def _standing_in(
    slots: dict[nn.Parameter, list[tuple[nn.Module, str]]], sums: dict[nn.Parameter, _Sum]
) -> Iterator[None]:
    """Modules hold the stand-ins inside."""
    changed = [(module, name, parameter) for parameter in sums for module, name in slots[parameter]]
    try:
        for module, name, parameter in changed:
            module._parameters[name] = sums[parameter].alias  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in changed:
            module._parameters[name] = parameter


def _autocast_of(device: str) -> Callable[[], AbstractContextManager[Any]]:
    enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def again() -> AbstractContextManager[Any]:
        # A weight is cast once for all tiles, as long as what was cast does not outlive them.
        return torch.autocast(device, dtype, enabled, cache_enabled=not torch.is_autocast_enabled(device))

    return again


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(*like.shape[:-1], *rows.shape[1:])
