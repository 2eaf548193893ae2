"""Which models can be sharded through the interfaces of Transformers alone, and what stands against the others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch import nn

from dsp_plugin.config.schema import DEEPSPEED_SECTION, SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.methods import METHODS
from dsp_plugin.patches.transformers import adapters
from dsp_plugin.patches.transformers.labels import shifting_part
from dsp_plugin.patches.transformers.mixers import ATTENTION, SERVED, attention_calls, mixers_of, unserved
from dsp_plugin.patches.transformers.seams import SEAMS
from dsp_plugin.patches.transformers.tiled_head import check_head
from dsp_plugin.patches.transformers.tiled_mlp import check_mlps
from dsp_plugin.patches.transformers.verified import SETTING, unverified
from dsp_plugin.patches.transformers.wrapped import is_causal_lm, model_in, sharded_part
from dsp_plugin.planner.auto import method_for
from dsp_plugin.planner.model_files import from_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Rotary embeddings whose frequencies follow from the largest position that a rank happens to see.
LENGTH_DEPENDENT = ("dynamic", "longrope")
# Not by its loss: a model that shifts labels itself would shift them within the shard.
DESCRIBE = (
    'if its attention calls scaled_dot_product_attention, describe it in the section ("batch": {"input_ids": 1}, '
    '"attention": names of the modules that do, "gather_output": 1), pass no labels and take the loss from the whole '
    "logits in the script; else remove the section"
)


class Heads(NamedTuple):
    """Query heads, and key/value heads."""

    query: int
    kv: int


def heads_of(model: PreTrainedModel) -> Heads:
    """The head counts that the model's config declares."""
    declared = model.config.get_text_config()
    query = declared.num_attention_heads
    return Heads(query, getattr(declared, "num_key_value_heads", None) or query)


def checked_section(
    module: nn.Module, section: Mapping[str, Any], tensor_parallel_size: int = 1
) -> SequenceParallelConfig:
    """The user's section, with sizes that fit the model's heads. Refuses what cannot be sharded.

    Args:
        module: the model, or PEFT's wrapper of it.

    Raises:
        PatchError: this Transformers is not one that we fit.
        UnsupportedError: the model does not go through the interfaces that we use, computes over whole sequences, or is
            of a family that no page calls exact, and the section does not take it unverified; or its adapters do.
        SequenceParallelConfigError: the method cannot serve its head counts.
    """
    for seam in SEAMS:
        seam.verify()
    model = model_in(module)
    assert model is not None
    for what, value, why, remedy in (*_obstacles(model), *adapters.obstacles(module, model)):
        raise UnsupportedError(
            setting=f"{what} of {type(model).__name__} with sequence_parallel", value=value, why=why, remedy=remedy
        )
    unknown = None if section.get(SETTING) else unverified(model) or adapters.unknown(module, model)
    if unknown is not None:
        compared = "compare it by dsp-plugin verify-model"
        if module is not model or not is_causal_lm(model):
            compared = "compare losses and gradients of a few steps with those of a run without the section"
        raise UnsupportedError(
            setting=f"{type(model).__name__} with sequence_parallel",
            why=unknown,
            remedy=f'{compared}, and if it is exact say "{SETTING}": true in the section',
        )
    part = sharded_part(model)
    section = _with_order(part, _with_method(model, section, tensor_parallel_size))
    if not attention_calls(part):
        return _of_states_alone(section, tensor_parallel_size)
    heads = heads_of(model)
    if heads.kv % tensor_parallel_size:
        raise SequenceParallelConfigError(
            setting="tensor_parallel.autotp_size",
            value=tensor_parallel_size,
            why=f"it does not divide the {heads.kv} key/value heads, so tensor-parallel ranks would hold unlike many, "
            "or none",
            remedy="choose a divisor",
        )
    local = max(heads.query // tensor_parallel_size, 1)
    config = SequenceParallelConfig.from_deepspeed({DEEPSPEED_SECTION: {"heads": local, **section}})
    assert config is not None
    check_mlps(part, config)
    if isinstance(config.tile_tokens, int):
        check_head(model)
    config.check_model(heads=heads.query, kv_heads=heads.kv, tensor_parallel_size=tensor_parallel_size)
    return config


def _with_order(part: PreTrainedModel, section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The section with the order of tokens in which states need not be moved, where the model has some.

    Raises:
        SequenceParallelConfigError: the method is for layers of which the model has none.
    """
    config = SequenceParallelConfig.from_deepspeed({DEEPSPEED_SECTION: section})
    assert config is not None
    if mixers_of(part):
        return section if config.layout != "auto" else {**section, "layout": "contiguous"}
    if config.kind == "linear":
        softmax = [name for name, method in METHODS.items() if method.kind == "softmax"]
        raise SequenceParallelConfigError(
            setting="method",
            value=config.method,
            why=f"it is for linear attention, and {type(part).__name__} has none",
            remedy=f"set it to one of {', '.join(softmax)}",
        )
    return section


def _of_states_alone(section: Mapping[str, Any], tensor_parallel_size: int) -> SequenceParallelConfig:
    """Of a model without softmax attention, whose heads are no concern of any method."""
    if tensor_parallel_size > 1:
        raise UnsupportedError(
            setting="tensor_parallel.autotp_size with sequence_parallel",
            value=tensor_parallel_size,
            why="tensor-parallel ranks would hold parts of layers that carry states, which nobody has compared",
            remedy="drop tensor_parallel",
        )
    config = SequenceParallelConfig.from_deepspeed({DEEPSPEED_SECTION: {"heads": section.get("size"), **section}})
    assert config is not None
    return config


def _with_method(model: PreTrainedModel, section: Mapping[str, Any], tensor_parallel_size: int) -> Mapping[str, Any]:
    """The section with the method that ``"auto"`` comes to for the model; any other as it is."""
    # Refuses what is illegal beside it.
    config = SequenceParallelConfig.from_deepspeed({DEEPSPEED_SECTION: section})
    if config is None or not config.automatic:
        return section
    world = dist.get_world_size() if dist.is_initialized() else config.size
    shapes = from_transformers(model.config.to_dict(), f"config of {type(model).__name__}")
    return method_for(shapes, section, world_size=world, tensor=tensor_parallel_size)


def check_described(module: Any, config: SequenceParallelConfig) -> None:
    """Check a section that describes a model by ``batch``.

    Raises:
        SequenceParallelConfigError: it takes the loss for one over the labels as given, and the model shifts them.
    """
    shifting = None if config.loss is None else shifting_part(module, config.loss.labels)
    if config.loss is not None and shifting is not None:
        raise SequenceParallelConfigError(
            setting="loss.labels",
            value=config.loss.labels,
            why=f"{shifting} shifts its labels itself, and would do so within each shard: the label of the last token "
            "of every run is lost",
            remedy='set "gather_output": 1 in place of "loss" and "labels" in "batch", pass no labels, and take the '
            "loss from the whole logits in the script",
        )


def _obstacles(model: PreTrainedModel) -> Iterator[tuple[str, Any, str, str]]:
    """What it is, its value, why it stands in the way, and the remedy."""
    causal_lm, part = is_causal_lm(model), sharded_part(model)
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        yield (
            "class",
            type(model).__name__,
            "method and size alone say enough about models of one sequence of tokens, which take input_ids: causal "
            "language models, encoders, and heads on their hidden states; this is none",
            DESCRIBE,
        )
    declared = model.config.get_text_config()
    other, mixers = unserved(part), mixers_of(part)
    if other:
        yield (
            "config.layer_types",
            other,
            "such layers carry something along the sequence otherwise than we know how to: known are "
            f"{', '.join(ATTENTION)} by Transformers' attention interface, and what calls {', '.join(SERVED)}",
            "use a model whose layers are of these kinds, or remove the section",
        )
    if not part._supports_attention_backend and not mixers:
        yield (
            "_supports_attention_backend",
            False,
            "it computes attention itself, not through the attention interface, so it would attend within a shard",
            DESCRIBE,
        )
    attends = attention_calls(part) > 0
    if attends and "position_ids" not in inspect.signature(part.forward).parameters:
        yield (
            "forward",
            "no position_ids",
            "it would number the tokens of every shard from 0",
            f'{DESCRIBE}. "positions" is for the argument that takes them, null if the model needs none',
        )
    # Transformers 4 calls them rope_scaling.
    rope = getattr(declared, "rope_parameters", None) or getattr(declared, "rope_scaling", None) or {}
    for rope_type in sorted(_rope_types(rope)):
        if any(name in rope_type for name in LENGTH_DEPENDENT):
            yield (
                "config.rope_parameters['rope_type']",
                rope_type,
                "its frequencies depend on the largest position in the batch, and every rank sees another one",
                'use a type with fixed frequencies, such as "linear", "yarn" or "llama3"',
            )
    if not causal_lm:
        return
    if not getattr(declared, "is_causal", True):
        yield "config.is_causal", False, "labels are the next tokens, which attention would see", "set it to true"
    from transformers.loss.loss_utils import ForCausalLMLoss

    if model.loss_function is not ForCausalLMLoss:
        yield (
            "loss_function",
            getattr(model.loss_function, "__name__", type(model.loss_function).__name__),
            "it is not Transformers' own for causal language models, of which we know how it adds up over shards",
            "leave it as it is and pass no labels: the model then returns whole logits, to compute any loss from",
        )


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """Of all layers: Transformers nests the parameters by layer type where layers differ."""
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return {str(found["rope_type"]) for found in (parameters, *nested) if found.get("rope_type")}
