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
  a group of one nothing travels, and it is as for Ring. A local kernel that pads values to D keeps its output so. In
  rounds of heads it is the same sum.
- LASP, with Hk query heads and K, V for key and value dims: the output and, on every rank but the first, the state that
  entered: ``B n H V e + B H K V w``. The final state too, if asked for: ``B H K V w``. With the exchange ``allgather``
  of P > 1 ranks also everyone's transition: ``P w`` times 0 for no decay, H for a decay per
  head, B H for one per token, B H K for one per key dim, B H K² for delta rules. In a layout that is not contiguous
  also what was put in order: ``B n (2 Hk K + H V) e`` and the gates. Bidirectional: the output, and instead of states
  ``B H K V w`` for each document with a token here.

Ordinary checkpointing keeps none of this; no checkpointing keeps all of it, and the inputs, and the rest of the model.
With `dsp_plugin.training.offload` all of it waits in host memory.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, wraps
from itertools import chain, repeat
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from dsp_plugin.derivatives import once_differentiable, refuse_transforms
from dsp_plugin.training import offload
from dsp_plugin.training.offload import Handle, Stretch, unpack

Attention = Callable[..., Tensor | tuple[Tensor, ...]]
Inputs = Sequence[Tensor | None]
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Answer = TypeVar("Answer", bound=Tensor | tuple[Tensor, ...])


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
        """Bytes kept now, here or in host memory: each storage once, inputs excluded."""
        kept = [tensor for call in self._calls for tensor in call.kept_tensors()]
        waiting = {id(each.block): each.block.nbytes for each in kept if isinstance(each, Handle)}
        storages = [tensor.untyped_storage() for tensor in kept if isinstance(tensor, Tensor)]
        return sum(waiting.values()) + sum({each._cdata: each.nbytes() for each in storages}.values())


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


def on_tape(attention: Callable[..., Answer]) -> Callable[..., Answer]:
    """``attention`` that answers from the tape of the checkpointed stretch it runs in, if any.

    Its parameters that can be given by position are its inputs, each a tensor or None: q, k and v of softmax attention;
    also g, beta and initial_state of linear attention. What can be given by keyword only are settings, never
    differentiated. It returns one tensor or a tuple of them.
    """
    parameters = inspect.signature(attention).parameters.values()
    signature = inspect.Signature([x for x in parameters if x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD])

    @wraps(attention)
    def aware(*args: Tensor | None, **kwargs: Any) -> Any:
        refuse_transforms("attention", *args, *(kwargs.get(name) for name in signature.parameters))
        mode = _mode()
        if mode is None:
            return attention(*args, **kwargs)
        named = {name: kwargs.pop(name) for name in signature.parameters if name in kwargs}
        bound = signature.bind(*args, **named)
        bound.apply_defaults()
        inputs = tuple(bound.arguments.values())
        call = mode.call(partial(attention, **kwargs), inputs)
        outputs = _FromTape.apply(call, *inputs)
        return outputs if call.many else outputs[0]

    return aware


class _KeptCall:
    """One attention call, made once.

    A second backward pass, through a retained graph, finds it freed by the first; the recomputation that comes before
    it makes the call again.

    Attributes:
        many: whether it returned a tuple.
    """

    def __init__(self, attention: Attention, inputs: Inputs) -> None:
        self._attention = attention
        self._shapes = _shapes(inputs)
        self._made: _Made | None = _make(attention, inputs)
        self.many = self._made.many

    def answer(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """The outputs again, for recomputed inputs.

        Raises:
            RuntimeError: the stretch does not run as it did at first.
        """
        if _shapes(inputs) != self._shapes:
            raise RuntimeError(
                f"attention was called with {_shapes(inputs)} where the checkpointed stretch first called it with "
                f"{self._shapes}: its control flow must not depend on anything that changes in between"
            )
        if self._made is None:
            self._made = _make(self._attention, inputs)
        if _versions(self._made.outputs) != self._made.versions:
            raise RuntimeError(
                "the output of attention was modified in place, and recompute='keep_attention' needs it again in the "
                "backward pass. Use an operation that is not in place, or recompute='full'."
            )
        return tuple(map(unpack, self._made.outputs))

    def kept_tensors(self) -> list[Handle | Tensor]:
        """What is held until the backward pass."""
        return [] if self._made is None else [*self._made.outputs, *self._made.kept]

    def backward(self, grads: Inputs, inputs: Inputs, needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs that need one, None for the others. Frees what was kept.

        Args:
            grads: of the outputs, None where nothing depends on one.
            inputs: their recomputed values.
            needed: of which inputs.

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
        pairs = zip(made.results, grads, strict=True)
        used = [(result, grad) for result, grad in pairs if result is not None and grad is not None]
        if not used:
            return (None,) * len(inputs)
        wanted = [edge for edge, need in zip(made.edges, needed, strict=True) if need and edge is not None]
        results, grads_of_results = zip(*used, strict=True)
        found = iter(torch.autograd.grad(results, wanted, grads_of_results, allow_unused=True))
        return tuple(next(found) if need else None for need in needed)


def _shapes(inputs: Inputs) -> list[tuple[tuple[int, ...], torch.dtype] | None]:
    return [None if x is None else (tuple(x.shape), x.dtype) for x in inputs]


@dataclass(frozen=True)
class _Made:
    """A call that was made.

    Attributes:
        many: whether it returned a tuple.
        results: where the gradients of its outputs enter the graph, whose saved tensors are all there but the inputs;
            None for an output that has none.
        outputs: as given to the model, or where they wait.
        versions: of the outputs, which count changes in place; None for one that waits.
        edges: where the gradients of the inputs leave the graph; None for an input that is None.
        kept: the saved tensors.
        recomputed: where the graph looks for the inputs.
    """

    many: bool
    results: tuple[GradientEdge | None, ...]
    outputs: tuple[Handle | Tensor, ...]
    versions: list[int | None]
    edges: tuple[GradientEdge | None, ...]
    kept: list[Handle | Tensor]
    recomputed: list[Tensor | None]


def _make(attention: Attention, inputs: Inputs) -> _Made:
    # The hooks must refer to nothing that leads back to the graph: no garbage collector sees cycles through it.
    kept: list[Handle | Tensor] = []
    recomputed: list[Tensor | None] = []
    stretch = offload.current()
    # Calls that the attention itself makes belong to it.
    with torch.enable_grad(), _During(lambda outer: None):
        entries = [None if x is None else _Entry.apply(x.detach(), _anchor(x)) for x in inputs]
        with saved_tensors_hooks(partial(_keep, _places(entries), kept, stretch), partial(_give, recomputed)):
            result = attention(*entries)
    results = (result,) if isinstance(result, Tensor) else tuple(result)
    outputs = tuple(_waiting(x.detach(), stretch) for x in results)
    edges = tuple(None if entry is None else get_gradient_edge(entry) for entry in entries)
    ends = tuple(get_gradient_edge(x) if x.requires_grad else None for x in results)
    many = not isinstance(result, Tensor)
    return _Made(many, ends, outputs, _versions(outputs), edges, kept, recomputed)


def _waiting(tensor: Tensor, stretch: Stretch | None) -> Handle | Tensor:
    return tensor if stretch is None else stretch.pack(tensor, fresh=True)


def _versions(outputs: Sequence[Handle | Tensor]) -> list[int | None]:
    return [x._version if isinstance(x, Tensor) else None for x in outputs]


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
    """A kept call in the graph of the model: the outputs come from the tape, the inputs from recomputation."""

    @staticmethod
    def forward(ctx: Any, call: _KeptCall, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.save_for_backward(*inputs)
        # Zeros for an output that nothing depends on would cost the call a backward pass through it.
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in call.answer(inputs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Reading the inputs recomputes the stretch, so it comes first.
        inputs = ctx.saved_tensors
        return None, *ctx.call.backward(grads, inputs, ctx.needs_input_grad[1:])


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
    return {_place(entry): index for index, entry in enumerate(entries) if entry is not None}


def _place(tensor: Tensor) -> Place:
    # The storage by its name, not by the address of its data: fake tensors, of dry runs, have none.
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def _keep(
    places: dict[Place, int], kept: list[Handle | Tensor], stretch: Stretch | None, tensor: Tensor
) -> int | Handle | Tensor:
    """Packs a saved tensor: an input as its index, others as they are, or as where they wait."""
    index = places.get(_place(tensor))
    if index is not None:
        return index
    kept.append(_waiting(tensor.detach(), stretch))
    return kept[-1]


def _give(recomputed: list[Tensor | None], saved: int | Handle | Tensor) -> Tensor:
    found = recomputed[saved] if isinstance(saved, int) else unpack(saved)
    assert found is not None, "only inputs that are tensors have a place"
    return found
