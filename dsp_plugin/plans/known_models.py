"""Models that a method and a size suffice for: what is sharded of their batch, which a config else describes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from dsp_plugin.config.checks import PLANNED
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.plans.plan import known_plan


@dataclass(frozen=True)
class KnownModel:
    """A model of which no config need say more than how to shard it.

    Attributes:
        settings: those that describe it. With labels it returns the mean loss, without labels outputs.
        softmax_heads: query heads of its softmax layers, if it has any.
    """

    settings: dict[str, Any]
    softmax_heads: Callable[[Any], int | None]


_NAME_A_PLAN = 'write a Plan for it and name that, as in "plan": "my_project.plans:my_model"'

# By qualified name of the class, so that nothing is imported before the user does.
KNOWN_MODELS: dict[str, KnownModel] = {
    "dsp_plugin.models.linear_lm.LinearLM": KnownModel(
        settings={
            "batch": {"input_ids": 1, "labels": 1},
            "attention": ("layers.*.mixer",),
            "positions": "position_ids",
            "loss": {"labels": "labels"},
            "gather_output": 1,
        },
        softmax_heads=lambda model: model.config.heads if model.config.softmax_every else None,
    )
}


def complete(module: nn.Module, config: SequenceParallelConfig) -> tuple[nn.Module, SequenceParallelConfig]:
    """What to hook, and the config with a batch: as given where it names one or leaves it to a plan.

    Args:
        module: the model, or one that has it as a part, in which case the part is hooked.

    Raises:
        SequenceParallelConfigError: the method shards a batch, none is named, and no part of the module is known.
    """
    if config.batch or config.plan is not None or config.kind == "switch":
        return module, config
    for part, known in _known_parts(module):
        return part, SequenceParallelConfig(**{**known.settings, **config.model_dump(exclude_unset=True)})
    if known_plan(module) is None:
        raise SequenceParallelConfigError(
            setting="method",
            value=config.method,
            why=f"it shards the batch, which the config does not describe, and {_name(type(module))} is not a model "
            f"that we know; known are {', '.join(KNOWN_MODELS)}",
            remedy='describe the model, as in "batch": {"input_ids": 1, "labels": 1}, "attention": ["layers.*.attn"], '
            '"loss": {"labels": "labels"}; where it shifts its labels itself, "gather_output": 1 in place of the loss, '
            "which the script takes from whole outputs" + (f"; or {_NAME_A_PLAN}" if config.method in PLANNED else ""),
        )
    return module, config


def softmax_heads(module: nn.Module) -> int | None:
    """Query heads of the softmax layers of the model that `complete` finds; None if there are none, or no model."""
    return next((known.softmax_heads(part) for part, known in _known_parts(module)), None)


def _known_parts(module: nn.Module) -> Iterator[tuple[nn.Module, KnownModel]]:
    for part in module.modules():
        for base in type(part).__mro__:
            known = KNOWN_MODELS.get(_name(base))
            if known is not None:
                yield part, known
                break


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
