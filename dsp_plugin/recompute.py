"""Rematerialization-aware checkpointing: recompute projections and MLPs, never attention nor what it sends.

Activation checkpointing runs a stretch of the model again in the backward pass. Attention is the dearest part of it,
and with sequence parallelism the part that communicates; LightSeq (arXiv 2310.03294, section 3.3) therefore keeps what
attention's backward pass needs. Here that holds for every method alike: while a checkpointed stretch runs first, each
attention call is put on a *tape* with the tensors its backward pass needs, except its inputs; when the stretch runs
again, the call is answered from the tape, and takes its inputs from the recomputed projections.

What a call keeps until its backward pass, beyond its inputs, in bytes of one rank. B, n, H, K, D, Dv as everywhere; e
bytes per element, w those of a log-sum-exp: 8 for fp64, else 4.

- Ring and LightSeq: the output and the log-sum-exp, ``B n H (Dv e + w)``.
- Ulysses, and USP with N tokens in a Ulysses group (N = L for Ulysses), of which this rank attends with h query and k
  key/value heads: also q, k and v as gathered, for they came over the wire, and the output on both sides of its way
  back, ``B N (h (D e + Dv e + w) + k (D + Dv) e) + B n H Dv e``. Where everything divides, N h = n H and N k = n K. In
  a group of one nothing travels, and it is as for Ring. A local kernel that pads values to D keeps its output so.

Ordinary checkpointing keeps none of this; no checkpointing keeps all of it, and the inputs, and the rest of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, wraps
from itertools import chain, repeat
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

Attention = Callable[..., Tensor]
Inputs = tuple[Tensor, ...]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Tape:
    """The attention calls of one checkpointed stretch, in order."""

    def __init__(self) -> None:
        self._calls: list[_KeptCall] = []

    def record(self) -> AbstractContextManager[None]:
        """While the stretch runs first. Within another stretch, its calls go on both tapes, or come from that one's."""
        return _During(lambda outer: _Recording(self._calls, outer))

    def replay(self) -> AbstractContextManager[None]:
        """While the stretch runs again; may be entered more than once."""
        return _During(lambda outer: _Replay(iter(self._calls)))

    def nbytes(self) -> int:
        """Bytes kept now: each storage once, inputs excluded."""
        storages = [tensor.untyped_storage() for call in self._calls for tensor in call.kept_tensors()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def keep_attention() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The ``context_fn`` of ``torch.utils.checkpoint.checkpoint(..., use_reentrant=False)``."""
    tape = Tape()
    return tape.record(), tape.replay()


def keeping_attention(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``function`` with its first call recorded on a tape, from which attention is answered in the calls after it.

    For implementations of checkpointing that call one function object, once forward and once backward.
    """
    tape = Tape()
    contexts = chain((tape.record(),), repeat(tape.replay()))

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with next(contexts):
            return function(*args, **kwargs)

    return run


def on_tape(attention: Attention) -> Attention:
    """``attention(q, k, v, ...)`` that answers from the tape of the checkpointed stretch it runs in, if any."""

    @wraps(attention)
    def aware(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        mode = _mode()
        if mode is None:
            return attention(q, k, v, **settings)
        call = mode.call(partial(attention, **settings), (q, k, v))
        return _FromTape.apply(call, q, k, v)

    return aware


class _KeptCall:
    """One attention call, made once.

    A second backward pass, through a retained graph, finds it freed by the first; the recomputation that comes before
    it makes the call again.
    """

    def __init__(self, attention: Attention, inputs: Inputs) -> None:
        self._attention = attention
        self._shapes = [(x.shape, x.dtype) for x in inputs]
        self._made: _Made | None = _make(attention, inputs)

    def answer(self, inputs: Inputs) -> Tensor:
        """The output again, for recomputed inputs.

        Raises:
            RuntimeError: the stretch does not run as it did at first.
        """
        if [(x.shape, x.dtype) for x in inputs] != self._shapes:
            raise RuntimeError(
                f"attention was called with {[(tuple(x.shape), x.dtype) for x in inputs]} where the checkpointed "
                f"stretch first called it with {[(tuple(shape), dtype) for shape, dtype in self._shapes]}: its control "
                "flow must not depend on anything that changes in between"
            )
        if self._made is None:
            self._made = _make(self._attention, inputs)
        if self._made.output._version != self._made.version:
            raise RuntimeError(
                "the output of attention was modified in place, and recompute='keep_attention' needs it again in the "
                "backward pass. Use an operation that is not in place, or recompute='full'."
            )
        return self._made.output

    def kept_tensors(self) -> list[Tensor]:
        """What is held until the backward pass."""
        return [] if self._made is None else [self._made.output, *self._made.kept]

    def backward(self, grad: Tensor, inputs: Inputs) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs, whose recomputed values are given. Frees what was kept.

        Raises:
            RuntimeError: a second backward pass, before which the stretch was not run again.
        """
        if self._made is None:
            raise RuntimeError(
                "a second backward pass through an attention call on a tape, which the first one freed: replay the "
                "stretch before each"
            )
        made, self._made = self._made, None
        made.recomputed.extend(inputs)
        return torch.autograd.grad(made.result, made.edges, grad, allow_unused=True)


@dataclass(frozen=True)
class _Made:
    """A call that was made.

    Attributes:
        result: its output with its graph, whose saved tensors are all there but the inputs.
        output: the same, as given to the model.
        version: of the output, which counts changes in place.
        edges: where the gradients of the inputs leave the graph.
        kept: the saved tensors.
        recomputed: where the graph looks for the inputs.
    """

    result: Tensor
    output: Tensor
    version: int
    edges: tuple[GradientEdge, ...]
    kept: list[Tensor]
    recomputed: list[Tensor]


def _make(attention: Attention, inputs: Inputs) -> _Made:
    # The hooks must refer to nothing that leads back to the graph: no garbage collector sees cycles through it.
    kept: list[Tensor] = []
    recomputed: list[Tensor] = []
    # Calls that the attention itself makes belong to it.
    with torch.enable_grad(), _During(lambda outer: None):
        entries = tuple(_Entry.apply(x.detach(), _anchor(x)) for x in inputs)
        with saved_tensors_hooks(partial(_keep, _places(entries), kept), partial(_give, recomputed)):
            result = attention(*entries)
    output = result.detach()
    edges = tuple(get_gradient_edge(entry) for entry in entries)
    return _Made(result, output, output._version, edges, kept, recomputed)


class _Recording:
    def __init__(self, calls: list[_KeptCall], outer: _Mode | None) -> None:
        self._calls, self._outer = calls, outer

    def call(self, attention: Attention, inputs: Inputs) -> _KeptCall:
        call = _KeptCall(attention, inputs) if self._outer is None else self._outer.call(attention, inputs)
        self._calls.append(call)
        return call


class _Replay:
    def __init__(self, calls: Iterator[_KeptCall]) -> None:
        self._calls = calls

    def call(self, attention: Attention, inputs: Inputs) -> _KeptCall:
        call = next(self._calls, None)
        if call is None:
            raise RuntimeError(
                "a checkpointed stretch made more attention calls when it was recomputed than when it first ran: its "
                "control flow must not depend on anything that changes in between"
            )
        return call


_Mode = _Recording | _Replay
_local = threading.local()


def _mode() -> _Mode | None:
    return getattr(_local, "mode", None)


class _During(AbstractContextManager[None]):
    """Sets the mode of this thread, made from the one before. Unlike a generator's, it can be entered repeatedly."""

    def __init__(self, make: Callable[[_Mode | None], _Mode | None]) -> None:
        self._make = make
        self._before: list[_Mode | None] = []

    def __enter__(self) -> None:
        self._before.append(_mode())
        _local.mode = self._make(self._before[-1])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _local.mode = self._before.pop()


class _FromTape(torch.autograd.Function):
    """A kept call in the graph of the model: the output comes from the tape, the inputs from recomputation."""

    @staticmethod
    def forward(ctx: Any, call: _KeptCall, *inputs: Tensor) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        return call.answer(inputs).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Reading the inputs recomputes the stretch, so it comes first.
        inputs = ctx.saved_tensors
        return None, *ctx.call.backward(grad, inputs)


class _Entry(torch.autograd.Function):
    """An input's place in a call's graph, which, unlike a leaf, does not hold the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        raise AssertionError("gradients are taken where they enter")


def _anchor(x: Tensor) -> Tensor:
    """Makes what it is passed along with part of the graph."""
    return torch.empty(0, dtype=x.dtype, device=x.device, requires_grad=True)


Place = tuple[Any, ...]


def _places(entries: Inputs) -> dict[Place, int]:
    return {_place(entry): index for index, entry in enumerate(entries)}


def _place(tensor: Tensor) -> Place:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _keep(places: dict[Place, int], kept: list[Tensor], tensor: Tensor) -> int | Tensor:
    """Packs a saved tensor: an input as its index, others as they are."""
    index = places.get(_place(tensor))
    if index is not None:
        return index
    kept.append(tensor.detach())
    return kept[-1]


def _give(recomputed: list[Tensor], saved: int | Tensor) -> Tensor:
    return recomputed[saved] if isinstance(saved, int) else saved
