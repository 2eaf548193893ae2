"""Local attention kernels: forward returning (out, lse), backward accepting the (out, lse) of any set of keys."""

from __future__ import annotations

from dsp_plugin.kernels.call import AttentionCall, prepare
from dsp_plugin.kernels.counter import Calls, calls
from dsp_plugin.kernels.merge import empty_state, merge_
from dsp_plugin.kernels.reference import dense_attention
from dsp_plugin.kernels.segments import Segments
from dsp_plugin.kernels.softmax import (
    attend,
    attention,
    block_backward,
    block_forward,
    segments_backward,
    segments_forward,
)
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.kernels.table import KERNELS, KernelRow, choose, describe

__all__ = [
    "KERNELS",
    "AttentionCall",
    "AttentionSpec",
    "Calls",
    "KernelRow",
    "Segments",
    "attend",
    "attention",
    "block_backward",
    "block_forward",
    "calls",
    "choose",
    "dense_attention",
    "describe",
    "empty_state",
    "merge_",
    "prepare",
    "segments_backward",
    "segments_forward",
]
