"""What a forward pass returned: the tensor in it that matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError


def first_tensor(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor that an output leads with (itself, ``["loss"]``, or the first), and how to put another in its place.

    Raises:
        SequenceParallelConfigError: it leads with no tensor.
    """
    if isinstance(output, Tensor):
        return output, lambda tensor: tensor
    if isinstance(output, dict) and output:
        key = "loss" if "loss" in output else next(iter(output))

        def in_dict(tensor: Tensor) -> Any:
            output[key] = tensor
            return output

        if isinstance(output[key], Tensor):
            return output[key], in_dict
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        make: Callable[[Any], Any] = getattr(type(output), "_make", type(output))
        return output[0], lambda tensor: make((tensor, *output[1:]))
    raise SequenceParallelConfigError(
        setting="model output",
        value=type(output).__name__,
        why="expected a tensor, a dict or a tuple that leads with one",
        remedy="return the tensor to be contracted or gathered first",
    )


def only_tensor(output: Any, module: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """As `first_tensor`, of a module that must return no other tensor, since that would stay a rank's own part.

    Args:
        module: its name.

    Raises:
        UnsupportedError: it returned further tensors.
    """
    found = first_tensor(output)
    parts = list(output.values()) if isinstance(output, dict) else output
    if isinstance(parts, tuple | list) and _count(parts) > 1:
        raise UnsupportedError(
            setting=f"output of {module}",
            value=type(output).__name__,
            why=f"it holds {_count(parts)} tensors, of which only the leading one is made whole again",
            remedy="ask the model for no hidden states and no attention weights",
        )
    return found


def all_tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor in an output, also in tuples, lists and dicts within it."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | tuple | list):
        for part in output.values() if isinstance(output, dict) else output:
            yield from all_tensors(part)


def _count(value: Any) -> int:
    if isinstance(value, tuple | list):
        return sum(_count(part) for part in value)
    return int(isinstance(value, Tensor))
