"""The model of Transformers that an engine is given: itself, or in a wrapper of PEFT's.

The wrapper stays as it is. It hands whole sequences to the model inside, which is what is sharded, and gets from it
what it would get of an unsharded one; what it computes itself (the embeddings of a prompt), all ranks compute alike.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def model_in(module: nn.Module) -> PreTrainedModel | None:
    """The model of Transformers; None where there is none. Imports nothing: a model's class is imported."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return None
    inner: Any = module
    if _is_wrapper(module):
        # Of tuners that change layers; prompts have the model itself below.
        inner = module.base_model
        inner = inner if isinstance(inner, modeling.PreTrainedModel) else inner.model
    return inner if isinstance(inner, modeling.PreTrainedModel) else None


def sharded_part(model: PreTrainedModel) -> PreTrainedModel:
    """What of a model gets a shard: a causal language model itself, whose loss is a sum over tokens, else its backbone.

    A head that pools, or labels tokens, or a script's own gets whole hidden states, on every rank alike.
    """
    if is_causal_lm(model):
        return model
    backbone: Any = model.base_model
    part: PreTrainedModel = backbone
    return part


def is_causal_lm(model: PreTrainedModel) -> bool:
    """Whether Transformers counts it among them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return any(kind.__name__ in known for kind in type(model).__mro__)


def _is_wrapper(module: nn.Module) -> bool:
    wrappers = [sys.modules.get("peft.peft_model"), sys.modules.get("peft.mixed_model")]
    kinds = tuple(
        getattr(found, name)
        for found, name in zip(wrappers, ("PeftModel", "PeftMixedModel"), strict=True)
        if found is not None
    )
    return isinstance(module, kinds)
