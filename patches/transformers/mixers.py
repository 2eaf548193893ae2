"""Layers that mix tokens otherwise than by softmax attention: which ones a model has, and what they compute sharded.

A layer is known by the functions that its forward calls (`mixer_functions`). While it runs in a sharded pass, and at no
other time, what stands in for them is found by their names. So the layer's own code makes the inputs, with its own
parameters, and takes the result.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import UnsupportedError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.patches.transformers.inputs import Placement
from dsp_plugin.patches.transformers.mixer_functions import CONVOLUTIONS, LINEAR, SHORTCUTS, WHOLE_LAYERS, named_by
from dsp_plugin.patches.transformers.mixing import SequenceMixing
from dsp_plugin.patches.transformers.overlay import Overlay
from dsp_plugin.patches.transformers.passes import ModelPass
from dsp_plugin.sharding.compiling import uncompiled
from dsp_plugin.training.extents import Running

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# As `config.layer_types` names layers: what attends by the interface, what holds a convolution and nothing else that
# mixes tokens, and what mixes none.
ATTENTION = ("full_attention", "sliding_attention")
BESIDE_ATTENTION = ("hybrid",)
CONVOLUTION = ("conv",)
POINTWISE = ("mlp", "moe")
SERVED = (*CONVOLUTIONS, *LINEAR, *WHOLE_LAYERS)
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_STANDINS = {**CONVOLUTIONS, **LINEAR, **SHORTCUTS}


def mixers_of(model: nn.Module) -> list[nn.Module]:
    """The modules whose forward carries states along the sequence, or convolves over it, as we know how to."""
    return [part for part in model.modules() if not named_by(part).isdisjoint(SERVED)]


def unserved(model: PreTrainedModel) -> list[str]:
    """The kinds of layers, as the config lists them, that carry something along the sequence that nobody serves."""
    kinds = _kinds(model)
    if not kinds:
        return ["recurrent"] if model._is_stateful else []
    layers = _layers(model)
    if layers is None:
        return sorted({kind for kind in kinds if kind not in ATTENTION}) or ["recurrent"] * bool(model._is_stateful)
    return sorted({kind for kind, layer in zip(kinds, layers, strict=True) if not _served(kind, layer)})


def attention_calls(model: PreTrainedModel) -> int:
    """How many times a forward pass calls the attention interface."""
    layers = _layers(model)
    if layers is None:
        found: int = model.config.get_text_config().num_hidden_layers
        return found
    return sum(_attends(part) for layer in layers for part in layer.modules())


class Mixers:
    """Has the mixers of a model compute over the whole sequence while its passes run.

    Attributes:
        parts: the mixers.
        calls: how many ran in the running forward pass.

    Args:
        passes: the model's.
        undo: gets what takes it all back.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SequenceParallelConfig,
        groups: SequenceParallelGroups,
        passes: Running[ModelPass],
        undo: ExitStack,
    ) -> None:
        self.parts = mixers_of(model)
        self._config, self._groups, self._passes = config, groups, passes
        self.calls, self._warned = 0, False
        for part in self.parts:
            Overlay(part, undo).replace("forward", self._sharded(part, part.forward))

    def check(self, placement: Placement) -> None:
        """Refuse rows of which mixers would make something else than unsharded, and warn where documents share states.

        Raises:
            UnsupportedError: padding that unsharded layers carry something through.
        """
        rows = placement.rows
        if not self.parts:
            return
        biased = [part for part in self.parts if getattr(getattr(part, "in_proj", None), "bias", None) is not None]
        for found, what, why in (
            (rows.interrupted, "padding in the midst of a document", "states decay, and convolutions reach, over it"),
            (rows.blind is not None, "a loss at padding in front of a row", "states are zero there, and it is moved"),
            (
                rows.order is not None and biased,
                f"padding in front of tokens, before {type(biased[0]).__name__}" if biased else "",
                "its convolution gets a bias at padding, which is moved",
            ),
        ):
            if found:
                raise UnsupportedError(
                    setting="attention_mask with sequence_parallel",
                    value=what,
                    why=f"{why}, in the linear layers of this model",
                    remedy="pad behind the tokens of a row, with labels of -100",
                )
        documents = rows.documents or rows.documents_by_row
        if documents is not None and not rows.told and not self._warned:
            self._warned = True
            warnings.warn(
                "position_ids start again within a row, and Transformers' linear layers do not look at positions: as "
                "unsharded, their states go on from one document to the next. To keep documents apart pass seq_idx or "
                "cu_seq_lens_q and cu_seq_lens_k, too (DataCollatorWithFlattening: return_seq_idx, "
                "return_flash_attn_kwargs).",
                stacklevel=2,
            )

    def _sharded(self, part: nn.Module, upstream: Callable[..., Any]) -> Callable[..., Any]:
        whole = next((WHOLE_LAYERS[name] for name in named_by(part) if name in WHOLE_LAYERS), None)

        @uncompiled
        def forward(*args: Any, **kwargs: Any) -> Any:
            running = self._passes.now
            if running is None:
                return upstream(*args, **kwargs)
            self.calls += 1
            mixing = SequenceMixing.of(running.placement, self._groups, self._config.exchange)
            if whole is not None:
                return whole(mixing, part, *args, **kwargs)
            with standing_in(part, mixing):
                output = upstream(*args, **kwargs)
            if not mixing.calls:
                raise UnsupportedError(
                    setting=f"{type(part).__name__} with sequence_parallel",
                    why=f"its forward called none of {', '.join(sorted(named_by(part)))}, so it mixed the tokens of a "
                    "shard alone",
                    remedy="leave the model's code and its kernels as Transformers has them, or remove the section",
                )
            return output

        return forward


@contextmanager
def standing_in(part: nn.Module, mixing: SequenceMixing) -> Iterator[None]:
    """Where the module's forward looks its functions up, ours are found by their names inside."""
    names = inspect.unwrap(type(part).forward).__globals__
    before = {name: names[name] for name in named_by(part)}
    names.update({name: partial(_STANDINS[name], mixing) for name in before})
    try:
        yield
    finally:
        names.update(before)


def _kinds(model: PreTrainedModel) -> list[str]:
    return list(getattr(model.config.get_text_config(), "layer_types", None) or ())


def _layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """The list of the model's layers, if there are mixers in it."""
    count = model.config.get_text_config().num_hidden_layers
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and len(part) == count and mixers_of(part):
            return part
    return None


def _served(kind: str, layer: nn.Module) -> bool:
    names = {name for part in layer.modules() for name in named_by(part)}
    linear, attends = names & {*LINEAR, *WHOLE_LAYERS}, any(_attends(part) for part in layer.modules())
    if kind in ATTENTION:
        return attends and not names
    if kind in BESIDE_ATTENTION:
        return attends and bool(linear)
    if kind in POINTWISE:
        return not attends and not names
    return not attends and bool(names if kind in CONVOLUTION else linear)


def _attends(part: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(part).forward), "__code__", None)
    return code is not None and _INTERFACE in code.co_names
