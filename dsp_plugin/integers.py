"""Whole numbers: those given from outside, taken as they are, never rounded, and never a truth value; and those worked
out from them for a device, copied there once."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Hashable, Iterable
from functools import lru_cache

import torch
from numpy.typing import NDArray
from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError

MOST = 2**63 - 1
"""What a tensor of positions can hold."""


def integer(value: object, setting: str, *, least: int = 0, remedy: str = "write a whole number such as 2") -> int:
    """``value`` as an int: Python's, numpy's or a tensor's, from ``least`` to what 64 bits hold.

    Raises:
        SequenceParallelConfigError: it is of another kind (a fraction, a truth value, text) or too small or large.
    """
    try:
        # A tensor of one truth value has an index, unlike numpy's.
        if isinstance(value, bool) or (isinstance(value, Tensor) and "bool" in str(value.dtype)):
            raise TypeError
        found = operator.index(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        wanted = f"an integer of {least} or more" if least >= 0 else "an integer"
        raise SequenceParallelConfigError(
            setting=setting,
            value=value,
            why=f"{wanted} is needed, not {type(value).__name__} {value!r}",
            remedy=remedy,
        ) from None
    if not least <= found <= MOST:
        raise SequenceParallelConfigError(
            setting=setting, value=found, why=f"it does not lie between {least} and {MOST}", remedy=remedy
        )
    return found


def integers(values: object, setting: str, *, remedy: str) -> tuple[int, ...]:
    """Each of ``values``, a sequence or a tensor, as `integer` takes it.

    Raises:
        SequenceParallelConfigError: there is no sequence, or one of them is no integer of 0 or more.
    """
    if isinstance(values, Tensor):
        values = values.tolist()
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise SequenceParallelConfigError(
            setting=setting,
            value=values,
            why=f"a sequence of integers is needed, not {type(values).__name__}",
            remedy=remedy,
        )
    given = tuple(values)
    # The borders of thousands of documents come by here with every batch.
    if set(map(type, given)) == {int} and min(given) >= 0 and max(given) <= MOST:
        return given
    return tuple(integer(value, setting, remedy=remedy) for value in given)


def integer_of(variable: str, default: int, *, least: int = 1) -> int:
    """The integer that an environment variable holds; ``default`` where it is not set.

    Raises:
        SequenceParallelConfigError: it is set to something else, an empty text too.
    """
    text = os.environ.get(variable)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal()) or not least <= int(text) <= MOST:
        raise SequenceParallelConfigError(
            setting=f"environment variable {variable}",
            value=text,
            why=f"it is no integer of {least} or more",
            remedy=f"unset it, or set it as torchrun does, to a number such as {max(least, 1)}",
        )
    return int(text)


def kept_on_device(make: Callable[..., tuple[NDArray, ...]], most: int = 16) -> Callable[..., tuple[Tensor, ...]]:
    """``make``, whose arrays come as tensors on a device, for as many calls as there are from one copy.

    A copy from the host's memory makes the host wait for the device; it is made with the first layer of a batch.

    Args:
        make: of hashable arguments.
        most: how many of the latest results are kept.

    Returns:
        A function of the same arguments and, by name, a ``device``. What it returns is not to be written to.
    """

    @lru_cache(maxsize=most)
    def copied(arguments: tuple[Hashable, ...], device: torch.device, _mode: object) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(array).to(device) for array in make(*arguments))

    def kept(*arguments: Hashable, device: torch.device) -> tuple[Tensor, ...]:
        # A dry run's fake tensors are of no use to the next one.
        mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        return copied(arguments, device, mode)

    return kept
