"""Which modules shift their labels themselves, of Transformers or of anybody's code."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from torch import nn

from dsp_plugin.patches.transformers.wrapped import is_causal_lm

# As code that comes with weights names its classes, too.
NAMES = ("ForCausalLM", "LMHeadModel")


def shifting_part(module: nn.Module, labels: str) -> str | None:
    """The class within the module that takes the label of a token from the token behind it; None if there is none.

    Args:
        labels: the argument of forward that holds them.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    for part in module.modules():
        of_transformers = modeling is not None and isinstance(part, modeling.PreTrainedModel)
        named = any(kind.__name__.endswith(NAMES) for kind in type(part).__mro__)
        # Wrappers pass labels on.
        takes_labels = labels == "labels" and (named or (of_transformers and is_causal_lm(part)))
        if takes_labels or ((of_transformers or part is module) and _shifts(type(part), labels)):
            return type(part).__name__
    return None


def _shifts(kind: Any, labels: str) -> bool:
    """Whether forward's code says so."""
    try:
        source = inspect.getsource(inspect.unwrap(kind.forward))
    except (OSError, TypeError):
        return False
    return re.search(rf"\b{re.escape(labels)}\s*\[\s*(\.\.\.|:)\s*,\s*1\s*:", source) is not None
