"""fp64 throughout: what a model's code casts to fp32 stays in fp64, so that rounding hides no mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NARROW = (torch.float32, torch.bfloat16, torch.float16)
# What casts without an argument.
CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


class InDouble(TorchFunctionMode):
    """While it is entered, every floating dtype that is asked of torch is fp64."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: Any = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs the function with the dtypes exchanged."""
        if function in CASTS:
            return args[0].double()
        given = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return function(*map(_widened, args), **given)


def _widened(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value


def backward(loss: Tensor) -> None:
    """``loss.backward()``, with the mode on in what is recomputed.

    Inside functions that a mode sees it is off, and `Tensor.backward` is one.
    """
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )
