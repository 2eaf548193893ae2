"""The numbers that a model gives its tokens where the script passes none, by the model's own code."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# RoBERTa and its kin count from behind the index of padding, and count no padding: Transformers' name for how they do
# it, by what they do it from.
NUMBERING = {
    "input_ids": "create_position_ids_from_input_ids",
    "inputs_embeds": "create_position_ids_from_inputs_embeds",
}


def own_positions(model: PreTrainedModel, values: Mapping[str, Any], mask: Tensor | None) -> Tensor | None:
    """The positions of whole sequences.

    Args:
        values: arguments of forward by name, whole.
        mask: ``[B, L]``, 0 for padding and 1 for tokens.

    Returns:
        int64 ``[B, L]``; None for a model that counts from 0, as most do.
    """
    source = next(name for name in NUMBERING if values.get(name) is not None)
    for part in model.modules():
        if mask is not None and _counts_tokens(part):
            # As `OPTLearnedPositionalEmbedding` does.
            found: Tensor = (mask.cumsum(1) * mask - 1).long()
            return found
        number = _numbering(part, NUMBERING[source])
        if number is not None:
            further = {"padding_idx": part.padding_idx} if "padding_idx" in inspect.signature(number).parameters else {}
            positions: Tensor = number(values[source], **further)
            return positions
    return None


def _counts_tokens(part: Any) -> bool:
    """Whether it numbers tokens by a mask, and padding not at all."""
    return isinstance(part, nn.Embedding) and "attention_mask" in inspect.signature(part.forward).parameters


def _numbering(part: Any, name: str) -> Callable[..., Tensor] | None:
    """A method of the embeddings, or beside their class: Transformers 4 has both."""
    if not hasattr(part, "padding_idx") or not hasattr(part, "position_embeddings"):
        return None
    beside = vars(sys.modules[type(part).__module__]).get(name)
    found: Callable[..., Tensor] | None = getattr(part, name, beside)
    return found
