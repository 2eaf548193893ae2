"""What a DeepSpeed config or call may hold that sequence parallelism cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.patches.deepspeed import pipeline, tensor_parallel

Config = Mapping[str, Any]


def refuse_conflicts(config: Config, model: nn.Module, mpu: object, mesh: object) -> None:
    """Refuses a second way to say how ranks are used, and features that assume a whole sample on every rank.

    Args:
        config: DeepSpeed's config, with our section.
        model: as given to `deepspeed.initialize`.
        mpu: the user's model parallel unit or None.
        mesh: `mesh_param`, or the device mesh made from it, or None.

    Raises:
        SequenceParallelConfigError: ranks are described twice, or a pipeline's batch not at all.
        UnsupportedError: a feature that does not compose yet.
    """
    for setting, value in _second_descriptions(config, mpu, mesh):
        raise SequenceParallelConfigError(
            setting=setting,
            value=value,
            why='the config has a "sequence_parallel" section, which alone says how ranks share a sequence; DeepSpeed '
            "would be told twice, and would scale gradients by its own rule",
            remedy=f'remove {setting}, or the "sequence_parallel" section',
        )
    section = SequenceParallelConfig.from_deepspeed(config)
    assert section is not None
    for feature, why, remedy in (
        *pipeline.unsupported(config, section, model),
        *tensor_parallel.unsupported(config, section, model),
        *_unsupported(config, model),
    ):
        raise UnsupportedError(f"{feature} with sequence_parallel: {why}. {remedy}.")
    if pipeline.is_pipeline(model):
        pipeline.check_section(section, model)


def _second_descriptions(config: Config, mpu: object, mesh: object) -> Iterator[tuple[str, object]]:
    for key in ("sequence_parallel_size", "data_parallel_size"):
        if key in config:
            yield key, config[key]
    if mesh is not None:
        yield "mesh_param", mesh
    if mpu is not None:
        yield "mpu", type(mpu).__name__


def _unsupported(config: Config, model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Feature, why, remedy."""
    from deepspeed.moe.layer import MoE

    if any(isinstance(module, MoE) for module in model.modules()) or _enabled(config, "expert_parallel"):
        yield (
            "mixture of experts (deepspeed.moe, expert_parallel)",
            "expert groups are cut from the ranks that sequence groups use",
            "Use dense layers, or remove the section",
        )
    if _enabled(config, "hybrid_engine"):
        yield "hybrid_engine", "it replaces the layers that carry our hooks", "Set hybrid_engine.enabled to false"
    if config.get("compile", {}).get("deepcompile", False):
        yield (
            "compile.deepcompile",
            "it recompiles the graph that our collectives are in",
            "Set compile.deepcompile to false",
        )
    for route, feature in (("data_sampling", "curriculum_learning"), ("data_routing", "random_ltd")):
        efficiency = config.get("data_efficiency", {})
        if efficiency.get("enabled", False) and _enabled(efficiency.get(route, {}), feature):
            yield (
                f"data_efficiency.{route}.{feature}",
                "it chooses samples or tokens per rank, so sequence peers would work on different ones",
                f"Set data_efficiency.{route}.{feature}.enabled to false",
            )
    if str(config.get("gradient_allreduce_op", "mean")).lower() == "sum":
        size = config["sequence_parallel"].get("size", "P")
        yield (
            "gradient_allreduce_op 'sum'",
            f"DeepSpeed would sum over sequence peers too, which is {size} times the sum over replicas",
            "Leave gradient_allreduce_op at 'mean'",
        )


def _enabled(config: Config, key: str) -> bool:
    return bool(config.get(key, {}).get("enabled", False))
