"""Whole logits where a script reads them, beside a loss; what nobody reads is not gathered.

With labels, a rank has the logits of its own tokens, and most scripts never look at them: gathered they are size times
as many, and at long lengths more than a device holds. A model's output therefore gathers them the first time that they
are read from it. To read them is a collective, then: all ranks of a sequence have to, as scripts do that run the same
on every rank.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from dsp_plugin.patches.transformers.pending import PendingLogits
from dsp_plugin.training.copies import LeftBehind

LOGITS = "logits"
_GATHER = "_gather_logits"
_unread: ContextVar[bool] = ContextVar("unread", default=False)


@contextmanager
def nobody_reads() -> Iterator[None]:
    """A stretch of a program that may walk over logits, and drops them: it sees those of this rank's tokens."""
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)


def gathered_when_read(output: Any, gather: Callable[[Any], Tensor]) -> Any:
    """``output`` with logits that ``gather`` makes whole where they are read; a plain tuple's are made whole now.

    Args:
        output: what a model returned: a loss, the logits of this rank's tokens, and whatever else.
    """
    if _unread.get():
        return output
    if isinstance(output, tuple) and len(output) > 1:
        logits = output[1]
        readable = logits.readable if isinstance(logits, PendingLogits) else isinstance(logits, Tensor)
        return (output[0], gather(logits), *output[2:]) if readable else output
    if isinstance(output, OrderedDict) and isinstance(output.get(LOGITS), Tensor | PendingLogits):
        output.__class__ = _lazy(type(output))
        object.__setattr__(output, _GATHER, gather)
    return output


class OutermostHook:
    """Puts `gathered_when_read` behind every other hook: what walks over a model's output must not count as reading.

    What a script calls without an engine, it wraps as it likes, and a wrapper that trains walks over every output: its
    logits are gathered where no gradient is asked for only.

    Args:
        take: the function that gathers the logits of the forward pass that has just ended; None where they are whole.
    """

    def __init__(self, take: Callable[[], Callable[[Any], Tensor] | None]) -> None:
        self._take, self._inside = take, 0

    def attach(self, model: nn.Module, engine: nn.Module | None = None) -> Callable[[], None]:
        """Hooks the model and what calls it, behind the hooks that they have; returns what takes the hooks off."""
        handles = [model.register_forward_hook(LeftBehind(self._after_model))]
        if engine is not None:
            handles.append(engine.register_forward_pre_hook(self._before_engine))
            handles.append(engine.register_forward_hook(self._after_engine))
            handles.append(engine.register_forward_hook(self._leave_engine, always_call=True))

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def _before_engine(self, *_: object) -> None:
        self._inside += 1

    def _leave_engine(self, *_: object) -> None:
        self._inside -= 1

    def _after_model(self, module: nn.Module, args: object, output: Any) -> Any:
        return output if self._inside or torch.is_grad_enabled() else self._lazily(output)

    def _after_engine(self, module: nn.Module, args: object, output: Any) -> Any:
        return self._lazily(output)

    def _lazily(self, output: Any) -> Any:
        gather = self._take()
        return output if gather is None else gathered_when_read(output, gather)


@cache
def _lazy(kind: type) -> type:
    """The class of outputs of one kind whose logits are gathered when they are read."""
    return type(kind)(kind.__name__, (_ReadLogits, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


class _ReadLogits(OrderedDict):
    """Every way to read a `ModelOutput`."""

    @property
    def logits(self) -> Tensor:
        """``[B, L, V]``. A collective of the sequence the first time."""
        gather = vars(self).get(_GATHER)
        if gather is not None:
            # Which forgets how, unless reading them is refused.
            self.logits = gather(OrderedDict.__getitem__(self, LOGITS))
        return OrderedDict.__getitem__(self, LOGITS)

    @logits.setter
    def logits(self, value: Tensor) -> None:
        vars(self).pop(_GATHER, None)
        vars(self)[LOGITS] = value
        OrderedDict.__setitem__(self, LOGITS, value)

    def __getitem__(self, key: Any) -> Any:
        if key == LOGITS:
            return self.logits
        if isinstance(key, str):
            return OrderedDict.__getitem__(self, key)
        names = list(self.keys())[key]
        return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

    def items(self) -> Any:
        return ((key, self[key]) for key in self.keys())

    def values(self) -> Any:
        return (self[key] for key in self.keys())

    def __reduce__(self) -> Any:
        kind = type(self).__mro__[2]
        return kind(**dict(self.items())).__reduce__()

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())
