"""The head of one causal language model and its loss, tile by tile, where the section asks for tiles.

The head's module is called twice over, of which its hooks see one call. The model's code calls it and gets
`PendingLogits`, with neither hooks nor a product: what the family does to logits is not known yet. The model's loss
function then calls it anew, and within that call, where ZeRO 3 and FSDP2 have gathered the weight, losses are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches.transformers.overlay import Overlay
from dsp_plugin.patches.transformers.pending import SETTING, UNTILED, PendingLogits
from dsp_plugin.patches.transformers.wrapped import is_causal_lm
from dsp_plugin.tiles.head import tiled_loss
from dsp_plugin.tiles.spec import HeadSpec, auto_tile_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Whose hooks on a head gather weights, or move them, and leave what it returns as it is.
_FRAMEWORKS = ("deepspeed", "torch", "accelerate", "dsp_plugin")


def tiled_head(
    model: PreTrainedModel, tiles: int | Literal["auto"] | None, wanted: Callable[[], bool], undo: ExitStack
) -> TiledHead | None:
    """What tiles the model's head from now on; None where the section asks for none, or ``auto`` cannot have any.

    Args:
        tiles: tokens of a tile.
        wanted: whether a forward pass runs that takes its loss from the head.
        undo: gets what takes it off.

    Raises:
        UnsupportedError: see `check_head`.
    """
    if tiles is None:
        return None
    if tiles != "auto":
        check_head(model)
    elif next(_obstacles(model), None) is not None:
        return None
    return TiledHead(model, tiles, wanted, undo)


def check_head(model: PreTrainedModel) -> None:
    """Check a model whose head is to be tiled.

    Raises:
        UnsupportedError: its head is none that a tile knows to compute.
    """
    for value, why in _obstacles(model):
        raise UnsupportedError(
            setting=f"{SETTING} of {type(model).__name__}", value=value, why=why, remedy=f"write {UNTILED}"
        )


def _obstacles(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """What the head is, and why that is not tiled."""
    if not is_causal_lm(model):
        yield (
            type(model).__name__,
            "of a model that is no causal language model the backbone is sharded, and its head computes as it does "
            "unsharded",
        )
        return
    head = _plain(model.get_output_embeddings())
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        yield (
            type(head).__name__,
            "a tile multiplies by the weight of an nn.Linear; adapters on a head, tensor parallelism and wrapped "
            "forwards compute something else",
        )


def _plain(head: Any) -> Any:
    """The head, or what of PEFT's ``modules_to_save`` stands in for it."""
    saved, active = getattr(head, "modules_to_save", None), getattr(head, "active_adapters", None)
    if isinstance(saved, nn.ModuleDict) and isinstance(active, list) and len(active) == 1 and active[0] in saved:
        return saved[active[0]]
    return head


@dataclass(frozen=True)
class _Request:
    labels: Tensor
    what: HeadSpec


class TiledHead:
    """In place on the head of one model; see `tiled_head`.

    Attributes:
        family: the model's class.
        classes: V.
    """

    def __init__(
        self, model: PreTrainedModel, tiles: int | Literal["auto"], wanted: Callable[[], bool], undo: ExitStack
    ) -> None:
        head: nn.Linear = _plain(model.get_output_embeddings())
        self.family, self.classes = type(model).__name__, head.out_features
        self._tile = auto_tile_tokens(self.classes) if tiles == "auto" else tiles
        self._wanted, self._head = wanted, head
        self._request: _Request | None = None
        self._call = head._call_impl
        overlay = Overlay(head, undo)
        overlay.replace("_call_impl", self._called)
        overlay.replace("forward", self._computed(head.forward))

    def logits(self, hidden: Tensor) -> Tensor:
        """Of all tokens at once, without gradients; under ZeRO 3 and FSDP2 a collective."""
        head = self._head
        if not hasattr(head.weight, "full_tensor"):
            return self._call(hidden)
        # FSDP2 has taken the head apart again.
        weight, bias = (None if x is None else x.full_tensor().to(hidden.dtype) for x in (head.weight, head.bias))
        return F.linear(hidden, weight, bias)

    def loss(self, hidden: Tensor, labels: Tensor, what: HeadSpec) -> Tensor:
        """The sum of the tokens' losses."""
        self._request = _Request(labels, what)
        try:
            return self._call(hidden)
        finally:
            self._request = None

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the head's call, hooks and all."""
        if not self._wanted():
            return self._call(*args, **kwargs)
        if len(args) != 1 or kwargs:
            self._refuse("its arguments", "the model's code calls it with more than hidden states")
        for hook in self._head._forward_hooks.values():
            origin = getattr(getattr(hook, "func", hook), "__module__", None) or type(hook).__module__
            if origin.partition(".")[0] not in _FRAMEWORKS:
                self._refuse(f"a forward hook of {origin}", "it would get a loss in place of logits")
        (hidden,) = args
        return PendingLogits(hidden, self)

    def _computed(self, upstream: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Stands in for the head's forward, in which its weight is whole."""

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if self._request is None:
                return upstream(*args, **kwargs)
            (hidden,) = args
            head, request = self._head, self._request
            if hasattr(head.weight, "full_tensor"):
                self._refuse("a weight in parts", "a tile multiplies by the whole weight, and this rank has a part")
            return tiled_loss(
                hidden, head.weight, request.labels, tile_tokens=self._tile, what=request.what, bias_V=head.bias
            )

        return forward

    def _refuse(self, value: str, why: str) -> None:
        raise UnsupportedError(
            setting=f"{SETTING} with the head of {self.family}", value=value, why=why, remedy=f"write {UNTILED}"
        )
