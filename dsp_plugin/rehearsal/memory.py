"""Which bytes are alive when: of tensors by watching operators, of real ones by what the CPU allocator reports as well.

The two instruments share nothing. `StorageTracker` sees the results of operators, real or fake, and when they die.
`AllocatorLog` reads torch's profiler, which the allocator tells of every allocation, those inside kernels included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch._C._profiler import _ExtraFields_Allocation
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsp_plugin.rehearsal.places import ModulePlaces
from dsp_plugin.rehearsal.timeline import BACKWARD, FORWARD, NOBODY, Timeline
from dsp_plugin.sharding.outputs import first_tensor


class Memory(NamedTuple):
    """Bytes on one rank.

    Attributes:
        parameters: of parameters and buffers.
        inputs: of the batch.
        gradients: of the parameters, as they are at the end of the backward pass.
        activations: at most, of all else: what forward keeps for backward, and what operators return on the way.
        peak: at most, of activations and gradients together; less than their sum where activations die as gradients
            come.
        host: at most, of what waits in host memory; the others are of the device.
    """

    parameters: int
    inputs: int
    gradients: int
    activations: int
    peak: int
    host: int = 0


# Operators that are no views, and for which a GPU runs nothing.
_LAUNCH_NOTHING = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view")
)


class StorageTracker(TorchDispatchMode):
    """Follows the storages that operators make while it is entered; views share one, and count once.

    Attributes:
        operators: that a GPU would launch a kernel for, or several, so far.

    Args:
        operator: called in place of the operator itself, for what a subclass of runs must do otherwise.
        places: says where in the model an operator runs.
    """

    def __init__(self, operator: Callable[..., Any] | None = None, places: ModulePlaces | None = None) -> None:
        super().__init__()
        self.timeline = Timeline()
        self.operators = 0
        self._operator, self._places = operator, places
        self._known: dict[int, _Known] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tensors_in((args, kwargs)):
            # What was there before this was entered is none of its business.
            self._see(tensor, None)
        result = func(*args, **kwargs) if self._operator is None else self._operator(func, args, kwargs)
        self.operators += not (func.is_view or func.overloadpacket in _LAUNCH_NOTHING)
        for tensor in tensors_in(result):
            self._see(tensor, func)
        return result

    def begin(self, phase: str) -> None:
        """What comes now is of this phase."""
        self.timeline.mark(phase)
        if self._places is not None:
            self._places.phase = phase

    def move_to_host(self, tensor: Tensor) -> None:
        """A tensor's storage, made while this is entered, is the host's."""
        for key in self.keys_of([tensor]):
            self.timeline.move_to_host(key)

    def keys_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """The keys in the timeline of the tensors' storages."""
        known = [self._known.get(tensor.untyped_storage()._cdata) for tensor in tensors]
        return {each.key for each in known if each is not None and each.key is not None}

    def _see(self, tensor: Tensor, maker: Any) -> None:
        """Args: maker: the operator that returned it, which counts; None for what was there before."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        key = None
        if maker is not None:
            owner = NOBODY if self._places is None else self._places.owner(maker)
            key = self.timeline.allocate(storage.nbytes(), owner)

        def forget(_: Any) -> None:
            del self._known[address]
            if key is not None:
                self.timeline.free(key)

        self._known[address] = _Known(weakref.ref(storage, forget), key)


class _Known(NamedTuple):
    storage: weakref.ref[Any]
    key: int | None


class AllocatorLog:
    """What the CPU allocator reported while this was entered."""

    def __init__(self) -> None:
        self.timeline = Timeline()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._latest: dict[int, int] = {}
        self._on_host: list[Tensor] = []

    def __enter__(self) -> Self:
        self._profile.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self._profile.__exit__(*failure)
        if failure[0] is None:
            self._read()
            for key in self.keys_of(self._on_host):
                self.timeline.move_to_host(key)
        self._on_host.clear()

    def move_to_host(self, tensor: Tensor) -> None:
        """A tensor's memory, made while this is entered, is the host's. It lives until then."""
        self._on_host.append(tensor)

    def keys_of(self, tensors: Iterable[Tensor]) -> set[int]:
        """The keys in the timeline of the tensors' memory."""
        return {self._latest[address] for tensor in tensors if (address := _address(tensor)) in self._latest}

    def _read(self) -> None:
        profiler = self._profile.profiler
        assert profiler is not None
        results = profiler.kineto_results
        assert results is not None
        pending, events = list(results.experimental_event_tree()), []
        while pending:
            event = pending.pop()
            pending.extend(event.children)
            if isinstance(event.extra_fields, _ExtraFields_Allocation):
                events.append((event.start_time_ns, event.extra_fields))
        changes = [change for _, change in sorted(events, key=lambda event: event[0])]
        alive = changes[0].total_allocated - changes[0].alloc_size if changes else 0
        for change in changes:
            # The allocator's total also knows of what other threads freed, such as gloo's, which have no profiler.
            before = change.total_allocated - change.alloc_size
            self.timeline.allocate(before - alive)
            alive = change.total_allocated
            if change.alloc_size > 0:
                self._latest[change.ptr] = self.timeline.allocate(change.alloc_size)
            elif change.ptr in self._latest:
                self.timeline.free(self._latest.pop(change.ptr))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def step(
    module: nn.Module, kwargs: dict[str, Any], backward: bool, mark: Callable[[str], object] = lambda phase: None
) -> None:
    """One forward pass and, if asked for, its backward pass from a gradient of the whole output.

    Args:
        mark: told when each of them begins.
    """
    mark(FORWARD)
    output = module(**kwargs)
    if backward:
        mark(BACKWARD)
        leading, _ = first_tensor(output)
        leading.backward(torch.ones_like(leading))


def memory_of(module: nn.Module, kwargs: dict[str, Any], log: StorageTracker | AllocatorLog) -> Memory:
    """The memory of a `step` that ran while ``log`` was entered."""
    gradients = _gradients(module)
    return Memory(
        parameters=_nbytes([*module.parameters(), *module.buffers()]),
        inputs=_nbytes(tensors_in(kwargs)),
        gradients=_nbytes(gradients),
        activations=log.timeline.peak(without=gradients_in(module, log)),
        peak=log.timeline.peak(),
        host=log.timeline.peak(on_host=True),
    )


def gradients_in(module: nn.Module, log: StorageTracker | AllocatorLog) -> set[int]:
    """The keys in the log's timeline of the parameters' gradients."""
    return log.keys_of(_gradients(module))


def _gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def _nbytes(tensors: Iterable[Tensor]) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
