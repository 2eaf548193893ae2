"""The table of methods. Adding one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm.meter import count, metering
from dsp_plugin.kernels.rows import row_by_row
from dsp_plugin.kernels.softmax import autocast
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import dsp, lasp, lightseq, ring, ulysses, usp
from dsp_plugin.methods.method import Method, Where, WireBytes, Workload
from dsp_plugin.training.recompute import on_tape

_ALL = (dsp.METHOD, ulysses.METHOD, ring.METHOD, usp.METHOD, lightseq.METHOD, lasp.METHOD)


def _entered(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Softmax attention in autocast's dtype, by rows where these are packed unlike.

    4 B H D operations a pair of tokens are counted, once if recomputed.
    """

    @wraps(attention)
    def entered(q: Tensor, k: Tensor, v: Tensor, *, what: AttentionSpec, where: Where, **settings: Any) -> Tensor:
        length, size = where.layout.length, where.layout.size

        def of_rows(q: Tensor, k: Tensor, v: Tensor, what: AttentionSpec) -> tuple[Tensor]:
            if metering() and torch._C._current_graph_task_id() == -1:
                batch, _, heads, dim = q.shape
                count(attention_flops=4 * batch * heads * dim * what.mask.pairs(length) // size)
            return (attention(q, k, v, what=what, where=where, **settings),)

        return row_by_row(of_rows, map(autocast, (q, k, v)), what, length)[0]

    return entered


def _complete(method: Method) -> Method:
    """Every attention answers from the tape of a checkpointed stretch, if there is one."""
    if method.attention is None:
        return method
    attention = on_tape(method.attention)
    return replace(method, attention=_entered(attention) if method.kind == "softmax" else attention)


METHODS: dict[str, Method] = {method.name: _complete(method) for method in _ALL}


__all__ = ["METHODS", "Method", "Where", "WireBytes", "Workload"]
