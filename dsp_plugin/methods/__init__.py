"""The table of methods. Adding one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm.meter import count, metering
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import dsp, lasp, lightseq, ring, ulysses, usp
from dsp_plugin.methods.method import Method, WireBytes, Workload
from dsp_plugin.training.recompute import on_tape

_ALL = (dsp.METHOD, ulysses.METHOD, ring.METHOD, usp.METHOD, lightseq.METHOD, lasp.METHOD)


def _metered(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Counts the work of softmax attention, 4 B H D operations a pair of tokens, once where it is recomputed."""

    @wraps(attention)
    def metered(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if metering() and torch._C._current_graph_task_id() == -1:
            layout, mask = kwargs["layout"], kwargs.get("mask") or MaskSpec()
            batch, _, heads, dim = q.shape
            work = 4 * batch * heads * dim * mask.pairs(layout.length)
            count(attention_flops=work // layout.size)
        return attention(q, *args, **kwargs)

    return metered


def _complete(method: Method) -> Method:
    """Every attention answers from the tape of a checkpointed stretch, if there is one, and is metered."""
    if method.attention is None:
        return method
    attention = on_tape(method.attention)
    return replace(method, attention=_metered(attention) if method.kind == "softmax" else attention)


METHODS: dict[str, Method] = {method.name: _complete(method) for method in _ALL}


__all__ = ["METHODS", "Method", "WireBytes", "Workload"]
