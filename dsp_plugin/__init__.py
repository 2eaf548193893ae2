"""Exact sequence parallelism for PyTorch, DeepSpeed and Megatron-core.

Importing this package also lets installed integrations hook the frameworks they serve: see the entry point group
``dsp_plugin.autoload``. The library itself knows no framework.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from dsp_plugin.comm import ledger
from dsp_plugin.comm.axis import Axis
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import (
    CollectiveMismatchError,
    DamagedCheckpointError,
    PatchError,
    SequenceParallelConfigError,
    UnsupportedError,
)
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.kernels.convolution import short_convolution
from dsp_plugin.kernels.linear import linear_attention
from dsp_plugin.kernels.softmax import attention as softmax_attention
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import Layout
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import METHODS, Where
from dsp_plugin.plans.plan import Plan
from dsp_plugin.plans.stage import Region, Stage
from dsp_plugin.sharding.parallelize import Parallelized, parallelize
from dsp_plugin.tiles.log_probs import token_log_probs
from dsp_plugin.training.data import PackedDocuments, SequenceParallelBatchSampler, SequenceParallelStream

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "AttentionSpec",
    "Axis",
    "CollectiveMismatchError",
    "DamagedCheckpointError",
    "Layout",
    "MaskSpec",
    "PackedDocuments",
    "Parallelized",
    "PatchError",
    "Plan",
    "Region",
    "SequenceParallelBatchSampler",
    "SequenceParallelConfig",
    "SequenceParallelConfigError",
    "SequenceParallelGroups",
    "SequenceParallelStream",
    "Stage",
    "UnsupportedError",
    "Where",
    "ledger",
    "linear_attention",
    "parallelize",
    "short_convolution",
    "softmax_attention",
    "token_log_probs",
]

for _integration in entry_points(group="dsp_plugin.autoload"):
    _integration.load()()
