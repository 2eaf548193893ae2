"""One model's attention implementation while its passes run, and its own at all other times.

Transformers looks an implementation up by the name in a model's config, so the name is ours for as long as a sharded
pass runs, or a part of it again. At all other times the model is as it was: it generates, its backbone can be called,
its config is saved, copied and given to other models, and all of that is what it is unsharded.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from itertools import count
from typing import TYPE_CHECKING, Any

from torch import nn

from dsp_plugin.patches.transformers.attention import SequenceAttention
from dsp_plugin.patches.transformers.mask import MaskReader
from dsp_plugin.sharding.compiling import leave_alone, pass_over_decorators

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Selection:
    """The name of an implementation in a config, where `selected` is entered.

    Args:
        config: of one model alone.
        name: under which Transformers' interfaces know the implementation.
    """

    def __init__(self, config: Any, name: str) -> None:
        self._config, self._name = config, name
        self._entered = 0
        self._before: list[tuple[Any, Any]] = []

    @contextmanager
    def selected(self) -> Iterator[None]:
        """The implementation is the config's inside; may be entered again inside, and left in any order."""
        if not self._entered:
            self._before = list(_implementations(self._config))
            self._config._attn_implementation = self._name
        self._entered += 1
        try:
            yield
        finally:
            self._entered -= 1
            if not self._entered:
                # A config's setter sets those below it, too: they come after it.
                for config, before in self._before:
                    config._attn_implementation = before


def select(
    model: PreTrainedModel,
    outer: nn.Module,
    prefix: str,
    attention: SequenceAttention,
    mask: MaskReader,
    undo: ExitStack,
) -> Selection:
    """Register attention and mask under a name that is the model's alone, which from now on has a config of its own.

    A config may be shared with another model, and the interface looks the name up in it.

    Args:
        outer: the model, or what it is wrapped in, which keeps its config, too.
        undo: gets what takes it all back.
    """
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

    # The functions that make masks call ours, which reads what they were given in their frames.
    leave_alone(("transformers.masking_utils",))
    pass_over_decorators(model)
    name = next(free for number in count() if (free := f"{prefix}_{number}") not in ALL_ATTENTION_FUNCTIONS)
    shared, own = model.config, deepcopy(model.config)
    for module in outer.modules():
        if vars(module).get("config") is shared:
            vars(module)["config"] = own
    for interface, ours in ((AttentionInterface, attention), (AttentionMaskInterface, mask)):
        interface.register(name, ours)
        # The table outlives the model.
        undo.callback(weakref.finalize(model, interface._global_mapping.pop, name))
    return Selection(own, name)


def _implementations(config: Any) -> Iterator[tuple[Any, Any]]:
    """The config and those within it, the outer first, each with its implementation."""
    yield config, config._attn_implementation
    for part in config.sub_configs:
        within = getattr(config, part, None)
        if within is not None:
            yield from _implementations(within)
