"""accelerate's collectives: between processes means between replicas, each rank with those that hold its part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.patches.accelerate.replicas import folded


def gathering(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``_gpu_gather``."""

    @functools.wraps(upstream)
    def _gpu_gather(tensor: Any) -> Any:
        groups = folded()
        if groups is None:
            return upstream(tensor)
        from accelerate.utils.operations import recursively_apply

        return recursively_apply(functools.partial(_gathered, axis=groups.dp), tensor, error_on_other_type=True)

    return _gpu_gather


def gathering_objects(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``_gpu_gather_object``."""

    @functools.wraps(upstream)
    def _gpu_gather_object(object: Any) -> Any:
        groups = folded()
        if groups is None:
            return upstream(object)
        found: list[Any] = [object]
        if groups.dp.size > 1:
            found = [None] * groups.dp.size
            dist.all_gather_object(found, object, group=groups.dp.group)
        return [item for of_process in found for item in of_process]

    return _gpu_gather_object


def reducing(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``reduce``, under each name by which it is called."""

    @functools.wraps(upstream)
    def reduce(tensor: Any, reduction: str = "mean", scale: float = 1.0) -> Any:
        groups = folded()
        if groups is None:
            return upstream(tensor, reduction=reduction, scale=scale)
        from accelerate.utils.operations import recursively_apply

        return recursively_apply(
            functools.partial(_reduced, axis=groups.dp, reduction=reduction), tensor, error_on_other_type=True
        )

    return reduce


def broadcasting(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``_gpu_broadcast``: a process is the first rank of a replica, and every rank receives."""

    @functools.wraps(upstream)
    def _gpu_broadcast(data: Any, src: int = 0) -> Any:
        return upstream(data, src=_first_rank(src))

    return _gpu_broadcast


def broadcasting_objects(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``broadcast_object_list``, under each name by which it is called."""

    @functools.wraps(upstream)
    def broadcast_object_list(object_list: Any, from_process: int = 0) -> Any:
        return upstream(object_list, from_process=_first_rank(from_process))

    return broadcast_object_list


def fetching(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``DataLoaderDispatcher._fetch_batches``: of the ranks that are process 0, one reads."""

    @functools.wraps(upstream)
    def _fetch_batches(self: Any, iterator: Any) -> Any:
        groups = folded()
        if groups is None or groups.dp.rank != 0 or groups.sp.rank == 0:
            return upstream(self, iterator)
        from accelerate.utils.operations import initialize_tensors

        state, self.state = self.state, _Elsewhere()
        try:
            batch, described = upstream(self, iterator)
        finally:
            self.state = state
        # What is sent is received into it.
        return (batch if described[0] is None else initialize_tensors(described[0])), described

    return _fetch_batches


class _Elsewhere:
    """The state of a process that does not read."""

    process_index = -1


def _first_rank(process: int) -> int:
    groups = folded()
    return process if groups is None else process * groups.sp.size


def _gathered(tensor: Tensor, axis: Axis) -> Tensor:
    tensor = (tensor.clone()[None] if tensor.ndim == 0 else tensor).contiguous()
    if axis.size == 1:
        return tensor.clone()
    found = [torch.empty_like(tensor) for _ in range(axis.size)]
    dist.all_gather(found, tensor, group=axis.group)
    return torch.cat(found)


def _reduced(tensor: Tensor, axis: Axis, reduction: str) -> Tensor:
    tensor = tensor.clone()
    if axis.size > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX if reduction == "max" else dist.ReduceOp.SUM, group=axis.group)
    if reduction == "mean":
        tensor /= axis.size
    return tensor
