"""AutoTP beside sequence parallelism: ranks are ``data x sequence x tensor``, tensor-parallel ranks adjacent.

DeepSpeed cuts ``tensor_parallel.autotp_size`` consecutive ranks to a tensor group, so data-parallel groups are strided,
and sequence groups are cut from those. Ranks of a tensor group hold the same tokens and other heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from dsp_plugin.comm.axis import Axis
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.patches.deepspeed import random_state
from dsp_plugin.patches.transformers import serves

SIZE = "tensor_parallel.autotp_size"


def size_of(config: Mapping[str, Any]) -> int:
    """Ranks of a tensor group; 1 without AutoTP."""
    return max(config.get("tensor_parallel", {}).get("autotp_size") or 1, 1)


def data_rows(world_size: int, size: int) -> list[list[int]]:
    """The data-parallel ranks of every tensor rank, by DeepSpeed's rule (`groups._init_tp_mesh_device`)."""
    return [list(range(first, world_size, size)) for first in range(size)]


def unsupported(
    config: Mapping[str, Any], section: SequenceParallelConfig, model: nn.Module
) -> Iterator[tuple[str, str, str]]:
    """Feature, why, remedy."""
    from deepspeed import PipelineModule

    if size_of(config) == 1:
        return
    if isinstance(model, PipelineModule):
        yield (
            f"{SIZE} > 1 in a PipelineModule",
            "AutoTP replaces DeepSpeed's grid of stages by one of its own",
            f"Set {SIZE} to 1, or train the layers as one torch.nn.Module",
        )
    elif not serves(model, section):
        yield (
            f"{SIZE} > 1 with a model other than Transformers' causal language models",
            "AutoTP leaves a rank a part of the heads, and only of those models is it known how their code and the "
            f"method {section.method} share them",
            f"Set {SIZE} to 1 (ZeRO 3 shards parameters in its place), or use such a model with a softmax method and "
            'without "batch" and "plan"',
        )
    if config["tensor_parallel"].get("vocab_parallel_lm_head"):
        yield (
            "tensor_parallel.vocab_parallel_lm_head",
            "its loss replaces the model's, which adds up over the sequence",
            "Leave it out or set it to false",
        )


def keep_vocabulary_whole(config_class: Any) -> None:
    """Says no where the config leaves it to AutoTP whether to shard a tied vocabulary, and replace the loss with it."""
    config_class.tensor_parallel_config.vocab_parallel_lm_head = False


def share_random_state() -> None:
    """Makes ranks of a tensor group draw alike: what they drop of activations is of the same activations."""
    from deepspeed.utils import groups

    random_state.share(Axis.of_group("tp", groups.get_tensor_model_parallel_group()))
