"""One rank of a world of GPUs that are not there: what Python code asks of ``torch.cuda``, and a fake process group.

For a process of its own, into which `guard.load` has loaded the device; see `process`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from dsp_plugin.kernels import triton_usable
from dsp_plugin.rehearsal.cuda.guard import loaded

_guard: ctypes.CDLL | None = None
_synchronized = 0
_looked_up: list[str] = []


def start(library: Path) -> None:
    """Make this process one with a GPU that computes nothing: a Hopper, with the flash attention inside torch, and the
    Triton that comes with torch where it is built for CUDA.
    """
    global _guard
    _guard = loaded(library)
    from_name = metadata.Distribution.from_name

    def looked_up(name: str) -> metadata.Distribution:
        _looked_up.append(name)
        return from_name(name)

    # Assigned by name, since that is no way to treat what other code has declared.
    answers: dict[Any, dict[str, Any]] = {
        torch.cuda: {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_capability": lambda device=None: (9, 0),
            "current_stream": lambda device=None: torch.accelerator.current_stream(),
            "synchronize": _synchronize,
        },
        torch.backends.cuda: {"is_flash_attention_available": lambda: True},
        triton_usable: {"unusable": lambda: None},
        # Fake tensors must not ask the device for memory, which torch does where it believes that there is one.
        FakeTensorMode: {"avoid_device_init": property(lambda self: True)},
        metadata.Distribution: {"from_name": staticmethod(looked_up)},
    }
    for owner, functions in answers.items():
        for name, answer in functions.items():
            setattr(owner, name, answer)


def _synchronize(device: Any = None) -> None:
    global _synchronized
    _synchronized += 1


def stream() -> int:
    """The number of the stream that is current in this thread; the default one is 0."""
    assert _guard is not None
    return int(_guard.current_stream_id())


def host_waits() -> int:
    """How often this process has waited for the device, a stream or an event."""
    assert _guard is not None
    return int(_guard.host_waits()) + _synchronized


def metadata_lookups() -> int:
    """How often this process has looked for the metadata of a package."""
    return len(_looked_up)


@contextmanager
def rank_of(rank: int, size: int) -> Iterator[None]:
    """This process as rank ``rank`` of a world of ``size`` ranks, of which the others are not there."""
    # Registers the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
