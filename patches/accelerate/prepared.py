"""Models that accelerate prepares are sharded by the section that the run was told.

After accelerate has put them into DDP, given them to ``fully_shard`` or compiled them, which copies of a model and
units of a plan need; both take gradients' mean over the world, which holds for replicas and for parts of sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import nn

from dsp_plugin.config import told
from dsp_plugin.patches.accelerate.replicas import folded
from dsp_plugin.sharding.parallelize import parallelize
from dsp_plugin.sharding.wrappers import unwrapped

_sharded: WeakSet[nn.Module] = WeakSet()


def preparing(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``Accelerator.prepare_model``; what `parallelize` refuses, it raises."""

    @functools.wraps(upstream)
    def prepare_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = upstream(self, model, *args, **kwargs)
        _shard(prepared)
        return prepared

    return prepare_model


def preparing_fsdp2(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces ``Accelerator._prepare_fsdp2``, which goes past ``prepare_model``."""

    @functools.wraps(upstream)
    def _prepare_fsdp2(self: Any, *args: Any) -> Any:
        prepared = upstream(self, *args)
        for item in prepared:
            if isinstance(item, nn.Module):
                _shard(item)
        return prepared

    return _prepare_fsdp2


def _shard(model: nn.Module) -> None:
    section, groups = told.told(), folded()
    if section is None or groups is None:
        return
    inside = unwrapped(model)
    if inside not in _sharded:
        parallelize(model, config=section, groups=groups).make_outputs_whole(inside, engine=model)
        _sharded.add(inside)
        told.settle()
