"""Whether and where Triton kernels run. Known without importing Triton where there is no device for them."""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

MIN_CAPABILITY = (8, 0)


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, which it does on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# Asked at every call. Importing Triton takes a second.
@lru_cache(maxsize=1)
def version() -> str | None:
    """That of Triton; None where it cannot be imported."""
    try:
        return str(importlib.import_module("triton").__version__)
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None


def unusable() -> str | None:
    """Why Triton kernels cannot run in this process; None if they can."""
    if not interpreted():
        if not torch.cuda.is_available():
            return "no cuda device"
        if torch.version.hip is not None:
            return "its tiles are sized for the shared memory of NVIDIA's GPUs"
    return None if version() is not None else "package triton is not installed, or cannot be imported"


@lru_cache(maxsize=64)
def refused(device: torch.device) -> str | None:
    """Why they cannot on a device; None if they can."""
    if device.type != "cuda":
        return f"it runs on cuda devices, the tensors are on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"it needs compute capability {MIN_CAPABILITY}, the device has {capability}"
    return None


def width(head_dim: int) -> int:
    """The columns of a tile, a power of two."""
    return max(16, 1 << (head_dim - 1).bit_length())


def launching(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
