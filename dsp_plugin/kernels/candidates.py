"""Which kernel ``auto`` will take, as far as it can be told before there are tensors."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch

from dsp_plugin.kernels import linear_fla
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.kernels.table import KERNELS, choose

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# One in each range that some kernel's limits tell from the others.
_HEAD_DIMS = (64, 192, 256, 512)
_DROPPING = AttentionSpec(dropout_p=0.5, dropout_seed=0)


def candidates(devices: Iterable[str], dtype: torch.dtype | None = None, dropout: bool = True) -> list[str]:
    """The kernels that ``auto`` takes for some tensors, in order of preference.

    Args:
        devices: types of those that the tensors may be on.
        dtype: of the tensors; None where it is not known.
        dropout: whether attention may drop.
    """
    return _found(devices, dtype, [AttentionSpec(), *([_DROPPING] if dropout else [])])


def _found(devices: Iterable[str], dtype: torch.dtype | None, specs: Iterable[AttentionSpec]) -> list[str]:
    dtypes = _DTYPES if dtype is None else (dtype,)
    found = {
        choose(spec, device, each, head_dim).name
        for spec, device, each, head_dim in product(specs, devices, dtypes, _HEAD_DIMS)
    }
    return [name for name in KERNELS if name in found]


def linear_candidates_in_words(devices: Iterable[str]) -> str:
    """The same for linear attention: ``fla, else chunked``."""
    cuda = [torch.device(device) for device in devices if device == "cuda"]
    fla = any(linear_fla.unusable(device, torch.bfloat16) is None for device in cuda)
    return "fla, else chunked" if fla else "chunked"


def candidates_in_words(devices: Iterable[str], dtype: torch.dtype | None = None, dropout: bool = True) -> str:
    """Such as ``cuda_flash, else math``; the dtype is named where another one would have other candidates.

    On CUDA what dropout costs is said by itself: no flash kernel drops alike however the sequence is sharded.
    """
    devices = tuple(devices)
    apart = dropout and "cuda" in devices
    found = candidates(devices, dtype, dropout and not apart)
    told_by_dtype = found != candidates(devices, None, dropout and not apart)
    words = ", else ".join(found) + (f" for {str(dtype).removeprefix('torch.')}" if told_by_dtype else "")
    if not apart:
        return words
    costs = (f"{name} ({KERNELS[name].dropout_cost})" for name in _found(["cuda"], dtype, [_DROPPING]))
    return f"{words}; dropout by {', else '.join(costs)}"
