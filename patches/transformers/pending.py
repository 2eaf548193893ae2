"""Logits that nobody has computed yet: what a model's own code does to them between its head and its loss.

Where the head is tiled, its module returns `PendingLogits` in place of logits. What families do to logits (a scale, a
soft cap, a wider dtype) is noted, for the tiles to do likewise; whatever else is asked of them is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from numbers import Real
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.tiles.spec import HeadSpec

SETTING = "memory.tile_tokens"
UNTILED = '"tile_tokens": null in the section\'s "memory", for a head that is not tiled'


class Head(Protocol):
    """What makes logits of hidden states."""

    family: str
    classes: int

    def logits(self, hidden: Tensor) -> Tensor:
        """Of all tokens at once, without gradients."""

    def loss(self, hidden: Tensor, labels: Tensor, what: HeadSpec) -> Tensor:
        """The sum of the tokens' losses."""


class PendingLogits:
    """Stands for ``[B, n, V]`` in a model's forward, and beside the loss in what it returns.

    After `HeadSpec`, logits are ``cap(scale * x)`` of what the head's product gave, x. Here they are ``inner * x``, or
    ``outer * tanh(inner * x)``.

    Attributes:
        shape: ``[B, n, V]``.
        dtype: which they would have.
        device: likewise.

    Args:
        hidden: ``[B, n, E]``, what the head was given.
    """

    def __init__(self, hidden: Tensor, head: Head) -> None:
        self._hidden: Tensor | None = hidden
        self._head = head
        self._inner, self._outer = 1.0, None
        self._steps: tuple[Callable[[Tensor], Tensor], ...] = ()
        self._returned = False
        kind = hidden.device.type
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self.dtype = self._autocast[1] if self._autocast[0] else hidden.dtype
        self.device, self.shape = hidden.device, torch.Size((*hidden.shape[:-1], head.classes))

    _inner: float
    _outer: float | None

    @property
    def ndim(self) -> int:
        """Of its shape."""
        return len(self.shape)

    def dim(self) -> int:
        """Of its shape."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    # What families do to logits.

    def tanh(self) -> PendingLogits:
        """Of a soft cap, between two scales."""
        if self._outer is not None:
            self._refuse("a second tanh")
        found = self._after(torch.tanh)
        found._outer = 1.0
        return found

    def mul(self, factor: Any) -> PendingLogits:
        """By a number."""
        return self._scaled("mul", factor, factor, lambda logits: logits * factor)

    def div(self, divisor: Any) -> PendingLogits:
        """By a number."""
        factor = 1.0 / divisor if isinstance(divisor, Real) and divisor else None
        return self._scaled("div", divisor, factor, lambda logits: logits / divisor)

    __mul__ = __rmul__ = multiply = mul
    __truediv__ = divide = true_divide = div

    def float(self) -> PendingLogits:
        """In fp32; tiles have fp32 or wider anyway."""
        return self.to(torch.float32)

    def to(self, dtype: Any) -> PendingLogits:
        """In a wider dtype."""
        if dtype == self.dtype:
            return self
        # What is fp64 is so for the sake of a comparison, and stays so in tiles.
        if dtype not in (torch.float32, torch.float64):
            self._refuse(f"to({dtype})")
        found = self._after(lambda logits: logits.to(dtype))
        found.dtype = dtype
        return found

    def contiguous(self) -> PendingLogits:
        """As they are."""
        return self

    # What becomes of them.

    def loss(self, labels: Tensor, classes: int, ignore_index: int) -> Tensor:
        """The sum of the tokens' losses, in fp32 or wider.

        Args:
            labels: int64 ``[B, n]``.
            classes: how many the loss is over.
        """
        if classes != self.shape[-1]:
            self._refuse(f"a loss over {classes} of its {self.shape[-1]} classes")
        outer = self._outer
        what = HeadSpec(scale=self._inner * (1.0 if outer is None else outer), softcap=outer, ignore_index=ignore_index)
        assert self._hidden is not None
        return self._head.loss(self._hidden, labels, what)

    def returned(self) -> None:
        """They are beside a loss now, in what the model returns: what is asked of them, a script asks."""
        self._returned = True
        if torch.is_grad_enabled():
            # Which would keep the whole graph.
            self._hidden = None

    @property
    def readable(self) -> bool:
        """Whether `compute` computes them: where the model ran without gradients."""
        return self._hidden is not None

    def compute(self) -> Tensor:
        """All logits of this rank's tokens, ``[B, n, V]``, without gradients, as the model has them.

        Raises:
            UnsupportedError: the model ran with gradients.
        """
        hidden, (autocast, dtype) = self._hidden, self._autocast
        if hidden is None:
            self._refuse("reading them")
        with torch.no_grad(), torch.autocast(hidden.device.type, dtype, enabled=autocast):
            logits = self._head.logits(hidden)
            for step in self._steps:
                logits = step(logits)
        return logits

    def _after(self, step: Callable[[Tensor], Tensor]) -> PendingLogits:
        found = copy(self)
        found._steps = (*self._steps, step)
        return found

    def _scaled(self, what: str, given: Any, factor: Any, step: Callable[[Tensor], Tensor]) -> PendingLogits:
        # A tensor may have a gradient, and to read it waits for the device.
        if isinstance(given, bool) or not isinstance(factor, Real) or not factor:
            self._refuse(f"{what} by {given!r}" if isinstance(given, Real) else f"{what} by a {type(given).__name__}")
        found = self._after(step)
        if self._outer is None:
            found._inner *= float(factor)
        else:
            found._outer = self._outer * float(factor)
        return found

    def _refuse(self, what: str) -> NoReturn:
        if self._returned:
            raise UnsupportedError(
                setting="logits beside a loss",
                value=what,
                why=f"{SETTING} keeps them from being made where gradients are taken",
                remedy="take the loss that the model returns (no label smoothing, no loss of the script's own) or one "
                f"of dsp_plugin.token_log_probs, read logits under torch.no_grad(), or write {UNTILED}",
            )
        raise UnsupportedError(
            setting=SETTING,
            value=what,
            why=f"the forward of {self._head.family} does this to its logits, and tiles know of scales, a soft cap and "
            "wider dtypes",
            remedy=f"write {UNTILED}",
        )

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", str(function))
        first = args[0] if args else None
        if isinstance(first, cls):
            if name in _KNOWN and not kwargs:
                return getattr(first, _KNOWN[name])(*args[1:])
            first._refuse(name)
        given = (*args, *(kwargs or {}).values())
        parts = (part for value in given for part in (value if isinstance(value, tuple | list) else (value,)))
        next(part for part in parts if isinstance(part, cls))._refuse(name)

    def __getattr__(self, name: str) -> NoReturn:
        # Who copies or inspects an object asks it for these.
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        self._refuse(name)


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(self: PendingLogits, *_: object, **__: object) -> NoReturn:
        self._refuse(name)

    return refuse


# Functions of torch that do what a method does.
_KNOWN = MappingProxyType({name: name for name in ("tanh", "mul", "multiply", "div", "divide", "true_divide")})
_OPERATORS = (
    *("add", "radd", "sub", "rsub", "rtruediv", "pow", "rpow", "matmul", "rmatmul", "neg", "abs", "mod", "floordiv"),
    *(
        "getitem",
        "setitem",
        "len",
        "iter",
        "contains",
        "float",
        "int",
        "bool",
        "index",
        "array",
        "lt",
        "le",
        "gt",
        "ge",
    ),
)
for _name in _OPERATORS:
    setattr(PendingLogits, f"__{_name}__", _refusing(_name))
