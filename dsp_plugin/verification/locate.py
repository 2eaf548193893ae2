"""Where a sharded model parts from the unsharded one: the first module whose output, or its gradient, differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import Layout
from dsp_plugin.verification.double import backward

# Of the largest entry; by then the losses differ by more than what rounding does.
LIMIT = 1e-9


Call = tuple[str, int]


class _Trace:
    """The first tensor that every call of a module returned, by name and number of the call, and its gradient."""

    def __init__(self) -> None:
        self.outputs: dict[Call, Tensor] = {}
        self.gradients: dict[Call, Tensor] = {}
        self._calls: Counter[str] = Counter()

    def record(self, name: str, output: Any) -> None:
        """Keeps what a module returned."""
        first = _first_tensor(output)
        if first is None or not first.is_floating_point():
            return
        call = name, self._calls[name]
        self._calls[name] += 1
        self.outputs[call] = first.detach()
        if first.requires_grad:
            first.register_hook(lambda gradient: self.gradients.__setitem__(call, gradient.detach()))


def first_difference(
    model: nn.Module,
    batch: Mapping[str, Any],
    shard: Callable[[nn.Module, SequenceParallelGroups], Any],
    groups: SequenceParallelGroups,
    loss_of: Callable[[Any], Tensor],
) -> str:
    """In words; empty where all that can be compared is equal. Every rank calls this.

    Compared is what runs along the sequence: tensors of which the sharded run has this rank's part, along one dim.
    """
    whole, sharded = deepcopy(model), deepcopy(model)
    with _traced(whole) as expected:
        backward(loss_of(whole(**deepcopy(dict(batch)))))
    handle = shard(sharded, groups)
    try:
        with _traced(sharded) as found:
            backward(loss_of(sharded(**deepcopy(dict(batch)))))
    finally:
        handle.remove()
    layouts = _layouts(batch, groups)
    forward = _difference(expected, found, layouts, groups, "output")
    return forward or _difference(expected, found, layouts, groups, "gradient of the output")


@contextmanager
def _traced(model: nn.Module) -> Iterator[_Trace]:
    trace = _Trace()
    handles = [
        part.register_forward_hook(lambda _, __, output, name=name: trace.record(name, output))
        for name, part in model.named_modules()
        if name
    ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _difference(
    expected: _Trace, found: _Trace, layouts: list[Layout], groups: SequenceParallelGroups, what: str
) -> str:
    """Forward, the first call that differs; backward, the first that backward comes to: the last call."""
    backward = what != "output"
    wanted, got = (expected.gradients, found.gradients) if backward else (expected.outputs, found.outputs)
    # Each rank has P times its share of a gradient, of which frameworks take the mean.
    factor = groups.sp.size if backward else 1
    # In the order of the calls, which all ranks have alike; gradients come in the order of the backward pass.
    for call in reversed(expected.outputs) if backward else expected.outputs:
        error = 0.0
        if call in wanted and call in got:
            error = _error(wanted[call], got[call] / factor, layouts, groups.sp.rank)
        if largest_of(error, groups) > LIMIT:
            return f"{call[0]}: {what} off by {largest_of(error, groups):.1e} of its largest entry"
    return ""


def _error(want: Tensor, got: Tensor, layouts: list[Layout], rank: int) -> float:
    """The least over the ways in which ``got`` can be part of ``want``; 0 where there is none."""
    errors, largest = [], want.abs().max().item() if want.numel() else 0.0
    for layout in layouts:
        # Not along the first dim, where experts have the tokens that come to them, by chance as many.
        for dim in range(1, want.dim()):
            if want.dim() != got.dim() or (want.shape[dim], got.shape[dim]) != (layout.length, layout.sizes[rank]):
                continue
            part = layout.shard(want, dim, rank)
            if part.shape == got.shape and got.numel() and largest:
                errors.append(((got - part).abs().max() / largest).item())
    return min(errors, default=0.0)


def _layouts(batch: Mapping[str, Any], groups: SequenceParallelGroups) -> list[Layout]:
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    lengths = sorted({size for value in tensors for size in value.shape[1:2]})
    kinds: tuple[Any, ...] = ("zigzag", "contiguous", "striped")
    layouts = [Layout(kind, length, groups.sp.size) for length in lengths for kind in kinds]
    for value in tensors:
        # Positions that start again: documents, which zigzag cuts one by one, or leaves whole.
        starts = (value[0] == 0).nonzero().flatten().tolist() if value.dim() == 2 else []
        if starts and starts[0] == 0:
            borders = (*starts, value.shape[1])
            layouts.append(Layout.of_documents("zigzag", value.shape[1], groups.sp.size, borders))
    return layouts


def largest_of(value: float, groups: SequenceParallelGroups) -> float:
    """The largest of the values that the ranks of a sequence have, on all of them."""
    values: list[Any] = [value] * groups.sp.size
    if groups.sp.size > 1:
        dist.all_gather_object(values, value, group=groups.sp.group)
    return float(max(values))


def _first_tensor(output: Any) -> Tensor | None:
    while output is not None and not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = next(iter(output.values()), None)
        elif isinstance(output, list | tuple):
            output = output[0] if output else None
        else:
            return None
    return output
