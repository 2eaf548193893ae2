"""Where one model's attributes reach into Transformers, with the versions in which they were tried."""

from __future__ import annotations

from typing import Any

from dsp_plugin.patches.patch import Patch

DISTRIBUTION = "transformers"
SUPPORTED = ">=4.57,<6"
TESTED = "5.24"


def _as_it_is(upstream: Any) -> Any:
    return upstream


# Nothing in the package itself is replaced: these are the places that one model's own attributes reach into. Tried with
# 4.57.6, 5.0.0, 5.23.0 and 5.24.0.
SEAMS = (
    Patch(
        name="run attention of one model by a method",
        target="transformers.modeling_utils:AttentionInterface.register",
        distribution=DISTRIBUTION,
        supported=SUPPORTED,
        tested=TESTED,
        make=_as_it_is,
        parameters=("key", "value"),
    ),
    Patch(
        name="read the masks of one model",
        target="transformers.masking_utils:AttentionMaskInterface.register",
        distribution=DISTRIBUTION,
        supported=SUPPORTED,
        tested=TESTED,
        make=_as_it_is,
        parameters=("key", "value"),
    ),
    Patch(
        name="take the loss of one model over the whole sequence",
        target="transformers.loss.loss_utils:ForCausalLMLoss",
        distribution=DISTRIBUTION,
        supported=SUPPORTED,
        tested=TESTED,
        make=_as_it_is,
        parameters=("logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels"),
    ),
    Patch(
        name="give one model a loss function",
        target="transformers.modeling_utils:PreTrainedModel.loss_function",
        distribution=DISTRIBUTION,
        supported=SUPPORTED,
        tested=TESTED,
        make=_as_it_is,
    ),
)
