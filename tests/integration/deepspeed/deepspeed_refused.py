"""Configurations that must be refused on every rank, in a world of 4: what is wrong, and what the message must say."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from causal_lm import CausalLM
from deepspeed_sharing import base_config
from torch import nn

from dsp_plugin.methods import METHODS
from dsp_plugin.models.linear_lm import LinearLM, LinearLMConfig


@dataclass(frozen=True)
class Refused:
    """A wrong call of `deepspeed.initialize`.

    Attributes:
        config: overrides at the top level of a config that is right.
        section: overrides inside the section; None removes a key.
        arguments: further arguments, or the name of a model in `MODELS` as "model".
        error: the name of the exception's type.
        says: fragments of its message.
        cell: method and feature of the cell that it holds, if any, and the reason as the page has it.
    """

    error: str
    says: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    section: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    cell: tuple[str, str, str] | None = None


CONFIG, UNSUPPORTED = "SequenceParallelConfigError", "UnsupportedError"
MICRO, TRAIN, ACCUMULATION = "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps"
REFUSED = {
    "size_not_in_world": Refused(CONFIG, ("size=3", "does not divide the 4 ranks"), section={"size": 3}),
    "size_above_world": Refused(CONFIG, ("size=8", "8 does not divide the 4 ranks"), section={"size": 8}),
    "size_zero": Refused(CONFIG, ("sequence_parallel", "size=0"), section={"size": 0}),
    "size_text": Refused(CONFIG, ("sequence_parallel", "size"), section={"size": "two"}),
    "unknown_method": Refused(CONFIG, ("uliyses", "'ulysses'"), section={"method": "uliyses"}),
    "unknown_key": Refused(CONFIG, ("unknown key 'sizes'", "Did you mean 'size'"), section={"sizes": 2}),
    "section_is_a_number": Refused(
        CONFIG, ("sequence_parallel", "expected a section"), config={"sequence_parallel": 2}
    ),
    "train_not_a_product": Refused(
        CONFIG,
        (
            "train_batch_size=16",
            "2 * gradient_accumulation_steps 2 * 2 replicas = 8",
            "4 ranks / sequence_parallel.size 2",
        ),
        config={TRAIN: 16, MICRO: 2, ACCUMULATION: 2},
    ),
    "train_not_a_multiple_of_micro": Refused(
        CONFIG,
        (
            "train_batch_size=6",
            "multiple of train_micro_batch_size_per_gpu 2 * 2 replicas = 4",
            "6 mod 4 = 2",
            "such as 8",
        ),
        config={TRAIN: 6, MICRO: 2},
    ),
    "train_not_a_multiple_of_accumulation": Refused(
        CONFIG,
        ("train_batch_size=9", "gradient_accumulation_steps 3 * 2 replicas = 6", "9 mod 6 = 3"),
        config={TRAIN: 9, ACCUMULATION: 3},
    ),
    "train_not_a_multiple_of_replicas": Refused(
        CONFIG, ("train_batch_size=3", "2 replicas = 2", "3 mod 2 = 1", "such as"), config={TRAIN: 3}
    ),
    "no_batch_size": Refused(CONFIG, ("neither train_batch_size nor", "samples"), config={ACCUMULATION: 2}),
    "negative_batch_size": Refused(CONFIG, ("train_batch_size=-4", "positive integer"), config={TRAIN: -4}),
    "auto_batch_size": Refused(CONFIG, (f"{MICRO}='auto'", "positive integer"), config={MICRO: "auto"}),
    "sequence_parallel_size": Refused(
        CONFIG,
        ("sequence_parallel_size=2", "remove sequence_parallel_size".capitalize()),
        config={"sequence_parallel_size": 2},
    ),
    "mesh_in_config": Refused(
        CONFIG,
        ("sequence_parallel_size=2", "told twice"),
        config={"sequence_parallel_size": 2, "data_parallel_size": 2},
    ),
    "mesh_param": Refused(CONFIG, ("mesh_param=(2, 2)", "told twice"), arguments={"mesh_param": (2, 2)}),
    "mpu": Refused(CONFIG, ("mpu='object'", "told twice"), arguments={"mpu": object()}),
    "pipeline_batch": Refused(
        CONFIG,
        ("batch", "(inputs, labels)", '"inputs.0"'),
        arguments={"model": "pipeline"},
    ),
    "pipeline_positions": Refused(
        CONFIG,
        ("positions", "hand tensors on without names", "inputs.1"),
        section={"batch": {"inputs": 1, "labels": 1}},
        arguments={"model": "pipeline"},
    ),
    "pipeline_attention": Refused(
        CONFIG,
        ("attention", "no module of any stage"),
        section={"batch": {"inputs.0": 1, "labels": 1}, "positions": "inputs.1", "attention": ["*.attn"]},
        arguments={"model": "pipeline"},
    ),
    "pipeline_above_world": Refused(
        CONFIG,
        ("size * pipeline_stages = 4 * 2 = 8 does not divide the 4 ranks",),
        section={"size": 4, "batch": {"inputs.0": 1, "labels": 1}, "positions": "inputs.1"},
        arguments={"model": "pipeline"},
    ),
    "experts": Refused(UNSUPPORTED, ("mixture of experts", "dense"), arguments={"model": "experts"}),
    "autotp_plain_model": Refused(
        UNSUPPORTED, ("tensor_parallel.autotp_size", "to 1"), config={"tensor_parallel": {"autotp_size": 2}}
    ),
    "hybrid_engine": Refused(UNSUPPORTED, ("hybrid_engine", "false"), config={"hybrid_engine": {"enabled": True}}),
    "deepcompile": Refused(UNSUPPORTED, ("compile.deepcompile", "false"), config={"compile": {"deepcompile": True}}),
    "summed_gradients": Refused(
        UNSUPPORTED, ("gradient_allreduce_op", "2 times", "'mean'"), config={"gradient_allreduce_op": "sum"}
    ),
    "curriculum": Refused(
        UNSUPPORTED,
        ("data_efficiency.data_sampling.curriculum_learning", "false"),
        config={"data_efficiency": {"enabled": True, "data_sampling": {"curriculum_learning": {"enabled": True}}}},
    ),
    "random_ltd": Refused(
        UNSUPPORTED,
        ("data_efficiency.data_routing.random_ltd", "false"),
        config={"data_efficiency": {"enabled": True, "data_routing": {"random_ltd": {"enabled": True}}}},
    ),
    "unknown_attention": Refused(CONFIG, ("attention", "blocks"), section={"attention": ["blocks.*.attn"]}),
    "unknown_argument": Refused(
        CONFIG, ("batch", "tokens"), section={"batch": {"tokens": 1, "position_ids": 1, "labels": 1}}
    ),
    "dsp_without_plan": Refused(
        CONFIG, ("plan",), section={"method": "dsp", "batch": None, "attention": None, "loss": None}
    ),
    "exchange_for_ulysses": Refused(
        CONFIG, ("exchange='ring'", "method ulysses exchanges no states", "lasp"), section={"exchange": "ring"}
    ),
    "lasp_for_an_unknown_model": Refused(
        CONFIG,
        ("method='lasp'", "causal_lm.CausalLM is not a model that we know", "LinearLM", '"batch": {'),
        section={"method": "lasp", "batch": None, "attention": None, "loss": None},
    ),
    "fewer_heads_than_ranks_in_a_hybrid": Refused(
        CONFIG,
        ("method='lasp'", "heads=3 < ulysses_size=4", "set a size of 3 or less"),
        section={
            **{"method": "lasp", "softmax_method": "ulysses", "size": 4},
            **{"batch": None, "attention": None, "loss": None},
        },
        arguments={"model": "hybrid"},
    ),
}
# A section of nothing but a method and a size.
BARE = {"batch": None, "attention": None, "loss": None}


def refused_pipelines() -> Iterator[tuple[str, Refused]]:
    """Cells of a `PipelineModule`."""
    for method in METHODS:
        section = {"method": method, **(BARE if method == "dsp" else {})}
        for zero in (0, 1, 2) if method == "dsp" else (2,):
            says = ("PipelineModule and a plan", "a stage holds its own layers only")
            reason = "a stage knows its own layers only, not the dim that the one before it left sharded"
            if zero == 2:
                says = ("PipelineModule", "stage 2", "DeepSpeed's own pipeline engine takes ZeRO 0 and 1")
                reason = "DeepSpeed's pipeline engine takes ZeRO 0 and 1 only"
            yield (
                f"pipeline_{method}_zero{zero}",
                Refused(
                    UNSUPPORTED,
                    says,
                    {"zero_optimization": {"stage": zero}},
                    section,
                    {"model": "pipeline"},
                    (method, f"PipelineModule, ZeRO {zero}", reason),
                ),
            )


def refused_tensor_parallel() -> Iterator[tuple[str, Refused]]:
    """Cells of AutoTP."""
    for method, model in (("dsp", "causal_lm"), ("lasp", "hybrid")):
        for zero in range(4):
            yield (
                f"autotp_{method}_zero{zero}",
                Refused(
                    UNSUPPORTED,
                    ("tensor_parallel.autotp_size", "Transformers' causal language models", f"method {method}"),
                    {"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": zero}},
                    {"method": method, **BARE},
                    {"model": model},
                    (method, f"AutoTP, ZeRO {zero}", "AutoTP is for Transformers' causal LMs, with softmax methods"),
                ),
            )


REFUSED |= dict(refused_pipelines()) | dict(refused_tensor_parallel())


def pipeline() -> nn.Module:
    """A model in DeepSpeed's own stages."""
    return deepspeed.PipelineModule([nn.Linear(2, 2), nn.Linear(2, 2)], num_stages=2, loss_fn=nn.MSELoss())


def experts() -> nn.Module:
    """A model with one expert layer."""
    from deepspeed.moe.layer import MoE

    return nn.Sequential(MoE(4, nn.Linear(4, 4), num_experts=2))


def hybrid() -> nn.Module:
    """Linear and softmax attention, three heads."""
    return LinearLM(LinearLMConfig(width=12, heads=3, layers=2, softmax_every=2))


MODELS: dict[str, Callable[[], nn.Module]] = {"pipeline": pipeline, "experts": experts, "hybrid": hybrid}


def attempt(refused: Refused) -> dict[str, Any]:
    """The exception that the call raises on this rank."""
    config = base_config(**refused.config)
    if refused.section:
        section = {**config["sequence_parallel"], **refused.section}
        config["sequence_parallel"] = {key: value for key, value in section.items() if value is not None}
    arguments = {"model": CausalLM, **refused.arguments}
    model = MODELS.get(arguments.pop("model"), CausalLM) if "model" in refused.arguments else CausalLM
    arguments.pop("model", None)
    try:
        deepspeed.initialize(model=model(), config=config, **arguments)
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error), "still_usable": _all_ranks_here()}
    return {"error": "", "message": "", "still_usable": True}


def _all_ranks_here() -> bool:
    """A collective after the refusal: it completes only if no rank is left inside another one."""
    total = torch.ones(())
    torch.distributed.all_reduce(total)
    return total.item() == torch.distributed.get_world_size()


def runs(folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """All refusals by name."""
    return {f"refused_{name}": functools.partial(attempt, refused) for name, refused in REFUSED.items()}
