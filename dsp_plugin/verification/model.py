"""A whole model, sharded beside unsharded, in fp64: losses, every gradient, and where they part.

Every rank trains a copy of the model on whole batches by itself, and another one with its peers. After each step the
losses and the gradients, averaged over the ranks as frameworks do it, are compared; the first module whose output, or
else the gradient of it, is another one is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.verification.double import InDouble, backward
from dsp_plugin.verification.locate import first_difference, largest_of

# Of what the unsharded run has; fp64 leaves four digits less than it has.
LIMIT = 1e-10
# Some gradients are zero but for rounding, such as those of a bias of keys; the error of a gradient is taken relative
# to no less than this part of the largest one.
SMALLEST_GRADIENT = 1e-4
# Large enough for the second and third step to see the first one's gradients.
LEARNING_RATE = 0.05

Batch = Mapping[str, Any]
Shard = Callable[[nn.Module, SequenceParallelGroups], Any]


@dataclass(frozen=True)
class Verdict:
    """What became of one comparison, the same on every rank.

    Attributes:
        status: "exact", "wrong", "refused" by us, or "not built" where the unsharded model itself failed.
        evaluated: it was compared in evaluation mode, for in training mode the model draws random numbers.
        why: of a refusal or a failure, its message; where it is wrong, what is.
        loss: the largest relative error of a loss.
        gradient: the largest relative error of a parameter's gradient, and of which.
        worst: that parameter.
        first: the first module that differs, and by what.
    """

    status: str
    why: str = ""
    loss: float = 0.0
    gradient: float = 0.0
    worst: str = ""
    first: str = ""
    evaluated: bool = False


def compare(model: nn.Module, batches: Sequence[Batch], shard: Shard, groups: SequenceParallelGroups) -> Verdict:
    """Train on the batches, a step on each. Every rank calls this with equal models and batches.

    Args:
        model: in fp64; it is left as it was, but for its mode.
        batches: whole, as the unsharded model takes them.
        shard: hooks a model; what it returns has ``remove``.
    """
    with InDouble():
        sharded = deepcopy(model)
        try:
            # What is refused at the start need not run unsharded.
            shard(sharded, groups).remove()
        except (SequenceParallelConfigError, UnsupportedError) as error:
            return Verdict("refused", _in_one_line(error))
        try:
            evaluated = model.training and _draws(model, batches[0])
            for copy in (model, sharded) if evaluated else ():
                copy.eval()
            whole = deepcopy(model)
            expected = [_step(whole, batch) for batch in batches]
        except Exception as error:
            return Verdict("not built", _in_one_line(error))
        handle = shard(sharded, groups)
        with ExitStack() as undo:
            undo.callback(handle.remove)
            try:
                found = [_step(sharded, batch, groups) for batch in batches]
            except (SequenceParallelConfigError, UnsupportedError) as error:
                return Verdict("refused", _in_one_line(error))
        return replace(_judged(model, batches, shard, groups, expected, found), evaluated=evaluated)


@dataclass(frozen=True)
class _Step:
    """The loss, and the gradients by parameter; of one that got none, zeros."""

    loss: Tensor
    gradients: dict[str, Tensor]


def loss_of(output: Any) -> Tensor:
    """The loss that a model returns, or one of what else it returns: the mean of its products with fixed numbers."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    first = loss if loss is not None else output
    while not isinstance(first, Tensor):
        first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    if first.numel() == 1:
        return first.reshape(())
    weights = torch.rand(first.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (first * weights.to(first.device)).mean()


def _draws(model: nn.Module, batch: Batch) -> bool:
    """Whether two passes differ that start with other random numbers."""
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        losses.append(loss_of(deepcopy(model)(**deepcopy(dict(batch)))).item())
    return losses[0] != losses[1]


def _step(model: nn.Module, batch: Batch, groups: SequenceParallelGroups | None = None) -> _Step:
    model.zero_grad()
    # Some models write into what they are given.
    loss = loss_of(model(**deepcopy(dict(batch))))
    backward(loss)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
        if groups is not None and groups.sp.size > 1:
            dist.all_reduce(gradient, group=groups.sp.group)
            gradient /= groups.sp.size
        gradients[name] = gradient
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.sub_(gradients[name], alpha=LEARNING_RATE)
    return _Step(loss.detach(), gradients)


def _judged(
    model: nn.Module,
    batches: Sequence[Batch],
    shard: Shard,
    groups: SequenceParallelGroups,
    expected: Sequence[_Step],
    found: Sequence[_Step],
) -> Verdict:
    loss, gradient, worst = 0.0, 0.0, ""
    for want, got in zip(expected, found, strict=True):
        loss = max(loss, _finite(((got.loss - want.loss).abs() / want.loss.abs()).item()))
        floor = SMALLEST_GRADIENT * max(g.abs().max().item() for g in want.gradients.values() if g.numel())
        for name, exact in want.gradients.items():
            if exact.numel():
                scale = max(exact.abs().max().item(), floor)
                error = _finite((got.gradients[name] - exact).abs().max().item() / scale)
                if error > gradient:
                    gradient, worst = error, name
    loss, gradient = largest_of(loss, groups), largest_of(gradient, groups)
    if loss <= LIMIT and gradient <= LIMIT:
        return Verdict("exact", loss=loss, gradient=gradient, worst=worst)
    first = first_difference(model, batches[0], shard, groups, loss_of)
    why = f"loss off by {loss:.1e}, gradients by {gradient:.1e}" + (f" ({worst})" if worst else "")
    return Verdict("wrong", why, loss, gradient, worst, first)


def _finite(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    known = isinstance(error, SequenceParallelConfigError | UnsupportedError)
    return text if known else f"{type(error).__name__}: {text[:300]}"
