"""Which derivatives pass through what is written by hand: backward ones, second ones where it says so, no others.

What only moves tensors is its own adjoint's adjoint, so its backward passes are differentiable. A kernel's are not.
Torch's own `once_differentiable` would lose their second derivatives without a word where no gradient that arrives
needs one itself, and torch has no clear words for tangents.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dsp_plugin.errors import UnsupportedError

_TWICE = (
    b"sequence_parallel: second derivatives were asked of an attention kernel, or of what is computed in tiles, and "
    b"these have first ones only. Take second derivatives where stages attend along whole dims by the model's own "
    b"attention (method dsp), or unsharded, without tiles."
)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A static ``backward`` whose results raise when they are differentiated, whatever they were made from."""

    @wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        many = found if isinstance(found, tuple) else (found,)
        raising = torch._C._functions.DelayedError(_TWICE, len(many))
        # What does not need a gradient gets no node to raise from.
        aliases: list[Any] = [None if grad is None else grad.detach().requires_grad_() for grad in many]
        outputs = raising(*aliases)
        return outputs if isinstance(found, tuple) else outputs[0]

    return once


def refuse_transforms(what: str, *tensors: Tensor | None) -> None:
    """Refuse tensors that carry a tangent or a batch dim of `torch.func`.

    Args:
        what: would have to know of it.

    Raises:
        UnsupportedError: some tensor does.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.maybe_current_level() is None and forward_ad._current_level < 0:
        return
    for x in tensors:
        if x is None:
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad.unpack_dual(x).tangent is not None:
            raise UnsupportedError(
                setting=f"torch.func and forward-mode derivatives through {what}",
                why="what it computes and sends has derivatives by backward passes only",
                remedy="take them by backward() or torch.autograd.grad, outside of torch.func's transforms, or run the "
                "model unsharded there",
            )
