"""What a GPU and NCCL would be asked for by code that runs on fake CUDA tensors; for a process of `process`.

Counted are operators as torch dispatches them, each of which is one kernel or more on a device. What moves nothing is
not counted: views, empty allocations, operators without elements. Attention kernels are counted apart, as the work that
all the rest is there for.
"""

from __future__ import annotations

import sys
import sysconfig
import traceback
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsp_plugin.comm.transfers import Transfer, observing
from dsp_plugin.rehearsal.cuda import device
from dsp_plugin.rehearsal.cuda.nccl import Posted

ATTENTION = (
    *("_flash_attention_forward", "_flash_attention_backward"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"),
    *("triton_attention_forward", "triton_attention_backward"),
)
# Those whose outputs torch cannot know the shapes, or Python the values, of without asking the device.
SYNCS = (
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "bincount", "_assert_async"),
)
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
VIEWS = ("_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "is_same_size", "record_stream")
COPIES = ("copy_", "_to_copy")
ONLY_WRITES = ("copy_", "fill_", "zero_", "_foreach_copy_")
PICKS = ("index_select", "gather", "index")


@dataclass
class Counts:
    """What one pass would cost.

    Attributes:
        kernels: launches by operator, attention left out.
        places: launches, attention too, by where they are made.
        attention: calls of attention kernels.
        traffic: bytes that the kernels counted read and write.
        syncs: where the host waited for the device, and by which operator.
        mixed: where an operator was given a CPU tensor beside CUDA ones.
        made: where a tensor was made from Python's or NumPy's numbers.
        uploads: where a CPU tensor was copied to the device.
        lookups: of the metadata of packages.
        posted: what NCCL was asked for, and when it was waited for, in order.
        faults: buffers that were written or read while NCCL had them, transfers that nobody waited for, and memory
            that was freed on a stream while another one may still have used it.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    places: Counter[Hashable] = field(default_factory=Counter)
    attention: int = 0
    traffic: int = 0
    syncs: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)
    lookups: int = 0
    posted: list[Posted] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return self.kernels.total()

    @property
    def collectives(self) -> int:
        """Collectives, and sends and receives each by itself."""
        started = [posted for posted in self.posted if posted.kind != "wait"]
        return sum(len(x.sends) + len(x.receives) if x.kind == "point_to_point" else 1 for x in started)


class Range(NamedTuple):
    """Bytes of a storage, which is named by its address."""

    storage: int
    start: int
    stop: int

    def meets(self, other: Range) -> bool:
        return self.storage == other.storage and self.start < other.stop and other.start < self.stop


class Signature(NamedTuple):
    """What the schema of an operator says of its arguments."""

    name: str
    namespace: str
    is_view: bool
    writes: tuple[int | str, ...]


class Recorder(TorchDispatchMode):
    """Counts what is dispatched while it is entered, on every thread that autograd takes it to, and what is sent.

    Args:
        place: where a launch is made, of an operator that runs now; None where nobody asks.
    """

    def __init__(self, place: Callable[[Any], Hashable] | None = None) -> None:
        super().__init__()
        self._place = place
        self.counts = Counts()
        self._flying: dict[Transfer, _Flight] = {}
        self._keys = count()
        self._known: dict[int, _Storage] = {}
        self._waits = device.host_waits()
        self._lookups = device.metadata_lookups()

    @contextmanager
    def looking_on(self) -> Iterator[None]:
        """Count in the block."""
        with self, observing(self):
            yield

    def take(self) -> Counts:
        """The counts since the last time, and start anew."""
        counts, self.counts = self.counts, Counts()
        waits, lookups = device.host_waits(), device.metadata_lookups()
        counts.syncs += ["synchronize"] * (waits - self._waits)
        counts.lookups = lookups - self._lookups
        self._waits, self._lookups = waits, lookups
        return counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        signature = signature_of(func)
        if signature.namespace in ("prim", "profiler"):
            return func(*args, **kwargs)
        given = _tensors((args, kwargs))
        if signature.name == "record_stream":
            self._known_of(args[0]).streams_told.add(args[1].stream_id)
            return None
        if _asks_the_device(signature.name, given):
            self._note(self.counts.syncs, signature.name)
        out = func(*args, **kwargs)
        if signature.namespace != "c10d":
            launched = self._count(signature, args, kwargs, given, _tensors(out))
            if launched and self._place is not None:
                self.counts.places[self._place(func)] += 1
        return out

    def _count(self, signature: Signature, args: Any, kwargs: Any, given: list[Tensor], out: list[Tensor]) -> bool:
        """Returns whether anything is launched."""
        on = {x.device.type for x in given}
        to = {x.device.type for x in out}
        if signature.name == "lift_fresh":
            self._note(self.counts.made, str(tuple(out[0].shape)))
            return False
        if "cuda" not in on | to or signature.is_view:
            return False
        written = _tensors([args[at] if isinstance(at, int) else kwargs.get(at) for at in signature.writes])
        read = [x for x in given if not any(x is y for y in written)]
        moved = {"cuda" if x.is_cuda else "cpu" for x in (*written, *out)} if written or out else set()
        waits_not = kwargs.get("non_blocking") or (signature.name == "copy_" and len(args) > 2 and args[2])
        if moved == {"cpu"} and any(x.is_cuda for x in read) and not waits_not:
            self._note(self.counts.syncs, f"{signature.name} to the host")
        elif moved == {"cuda"} and read and all(not x.is_cuda for x in read) and signature.name in COPIES:
            self._note(self.counts.uploads, str(tuple(read[0].shape)))
        elif len(on) > 1 and any(x.dim() and not x.is_cuda for x in given):
            self._note(self.counts.mixed, signature.name)
        self._watch(signature, read, written, out)
        if signature.name in ALLOCATIONS or not any(x.numel() for x in (*out, *written)):
            return False
        if signature.name in ATTENTION:
            self.counts.attention += 1
            return True
        self.counts.kernels[signature.name] += 1
        fresh = [x for x in out if not any(x is y for y in written)]
        reads = read if signature.name in ONLY_WRITES else [*read, *written]
        if signature.name in PICKS:
            reads = [*fresh, *given[1:]]
        self.counts.traffic += sum(map(nbytes, (*reads, *fresh, *written)))
        return True

    def started(self, transfer: Transfer) -> None:
        """See `TransferObserver`."""
        sent, received = ([_range(x) for x in buffers] for buffers in (transfer.sent, transfer.received))
        for other in self._flying.values():
            if _meet(received, [*other.sent, *other.received]) or _meet(sent, other.received):
                self._note(self.counts.faults, f"{transfer.kind} shares memory with what is in flight")
        key = next(self._keys)
        self._flying[transfer] = _Flight(key, sent, received)
        self._use(transfer)
        self.counts.posted.append(Posted(transfer.kind, transfer.ranks, transfer.sends, transfer.receives, key))

    def waited(self, transfer: Transfer) -> None:
        """See `TransferObserver`."""
        flight = self._flying.pop(transfer, None)
        if flight is None:
            self._note(self.counts.faults, f"{transfer.kind} was waited for twice")
            return
        # By the stream that waits. Memory of another one may be given away before this one has come so far.
        self._use(transfer)
        self.counts.posted.append(Posted("wait", transfer.ranks, (), (), flight.key))

    def _use(self, transfer: Transfer) -> None:
        for x in (*transfer.sent, *transfer.received):
            self._used(x)

    def finish(self) -> None:
        """What was not waited for is a fault."""
        self.counts.faults += ["a transfer was never waited for"] * len(self._flying)
        self._flying.clear()

    def _watch(self, signature: Signature, read: list[Tensor], written: list[Tensor], out: list[Tensor]) -> None:
        for x in (*read, *written, *out):
            if x.is_cuda:
                self._used(x)
        if not self._flying:
            return
        reads, writes = ([_range(x) for x in tensors if x.is_cuda] for tensors in (read, written))
        for flight in self._flying.values():
            if _meet(writes, [*flight.sent, *flight.received]):
                self._note(self.counts.faults, f"{signature.name} writes what is in flight")
            if _meet(reads, flight.received):
                self._note(self.counts.faults, f"{signature.name} reads what has not arrived")

    def _used(self, x: Tensor) -> None:
        self._known_of(x).streams.add(device.stream())

    def _known_of(self, x: Tensor) -> _Storage:
        storage = x.untyped_storage()
        address = storage._cdata
        known = self._known.get(address)
        if known is None:
            known = self._known[address] = _Storage(device.stream())
            known.alive = weakref.ref(storage, lambda _: self._freed(address))
        return known

    def _freed(self, address: int) -> None:
        known = self._known.pop(address)
        strangers = known.streams - known.streams_told - {known.made_on}
        if strangers:
            self.counts.faults.append(
                f"memory of stream {known.made_on} was freed, and stream {min(strangers)} may still use it"
            )

    def _note(self, where: list[str], what: str) -> None:
        where.append(f"{what} at {site()}")


class _Flight(NamedTuple):
    key: int
    sent: list[Range]
    received: list[Range]


class _Storage:
    def __init__(self, made_on: int) -> None:
        self.made_on, self.streams, self.streams_told = made_on, {made_on}, set[int]()
        self.alive: weakref.ref[Any] | None = None


@contextmanager
def recording() -> Iterator[Recorder]:
    """Fake CUDA tensors in the block, and a recorder of what is done to them."""
    recorder = Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True), recorder.looking_on():
        yield recorder


@cache
def signature_of(func: Any) -> Signature:
    """Of an operator."""
    schema = func._schema
    name = schema.name.split("::")[-1]
    writes = [
        argument.name if argument.kwarg_only else index
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return Signature(name, func.namespace, aliases or name in VIEWS, tuple(writes))


def _asks_the_device(name: str, given: list[Tensor]) -> bool:
    if name in ("index", "index_put", "index_put_") and any(x.dtype in (torch.bool, torch.uint8) for x in given[1:]):
        # How many there are is known once they are counted.
        return any(x.is_cuda for x in given)
    return name in SYNCS and any(x.is_cuda for x in given)


def nbytes(x: Tensor) -> int:
    """Of the elements of a tensor, those that are repeated by a stride of 0 once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements *= 1 if stride == 0 and size else size
    return elements * x.element_size()


def site(raised: BaseException | None = None) -> str:
    """The line that runs, of neither torch nor the rehearsal nor Python; in a backward pass there may be none.

    Args:
        raised: the line that raised this, in place of the one that runs.
    """
    lines = reversed(list(traceback.walk_tb(raised.__traceback__))) if raised else traceback.walk_stack(None)
    for frame, line in lines:
        if _is_told(frame.f_code.co_filename):
            return f"{_short(frame.f_code.co_filename)}:{line}"
    return "no line"


@cache
def _is_told(file: str) -> bool:
    if file.startswith(("<", f"{torch.__path__[0]}/", str(Path(__file__).parents[1]))):
        return False
    return not file.startswith(sysconfig.get_path("stdlib")) or "-packages/" in file


@cache
def _short(file: str) -> str:
    """As its module is found: from the longest folder that modules are looked for in."""
    folders = [str(Path(folder).resolve()) for folder in (*sys.path, str(Path(__file__).parents[3]))]
    within = max((folder for folder in folders if file.startswith(f"{folder}/")), key=len, default="")
    return file.removeprefix(f"{within}/")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _range(x: Tensor) -> Range:
    start = int(x.storage_offset()) * x.element_size()
    extent = sum((int(size) - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    extent = extent if x.numel() else 0
    return Range(x.untyped_storage()._cdata, start, start + extent * x.element_size())


def _meet(these: list[Range], others: list[Range]) -> bool:
    by_storage = defaultdict(list)
    for other in others:
        by_storage[other.storage].append(other)
    return any(this.meets(other) for this in these for other in by_storage[this.storage])
