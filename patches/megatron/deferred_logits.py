"""What an output layer returns in place of logits, and the losses and predictions that are taken of it tile by tile."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.wire import Sender, collect
from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches.megatron.state import Memory
from dsp_plugin.tiles.head import tiled_token_losses
from dsp_plugin.tiles.spec import HeadSpec, Vocabulary, auto_tile_tokens, tiles_of

METHOD = "head"
"""The name of the head's collectives in the ledger."""


def tile_of(memory: Memory, vocabulary: int) -> int | None:
    """Tokens in a tile; None where the head is not to be tiled.

    Args:
        memory: the setting.
        vocabulary: entries of it on this rank.
    """
    if memory == "auto":
        return auto_tile_tokens(vocabulary)
    return memory.tile_tokens


@dataclass(frozen=True, eq=False)
class DeferredLogits:
    """What logits are made of. Numbers may scale it, as MuP does; anything else that is done to logits is refused.

    Attributes:
        hidden: [s, b, h], of all tokens that this rank's part of the vocabulary sees; its gradient is a partial sum
            that the graph behind it adds up over the tensor-parallel ranks.
        weight: [V / TP, h].
        bias: [V / TP], or None.
        tp: the ranks that share the vocabulary.
        tile: tokens whose logits are alive at once.
        scale: of the logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    tp: Axis
    tile: int
    scale: float = 1.0

    def __mul__(self, factor: Any) -> DeferredLogits:
        return self._scaled(factor, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> DeferredLogits:
        return self._scaled(divisor, 1.0 / divisor if isinstance(divisor, int | float) else divisor)

    def _scaled(self, given: Any, factor: Any) -> DeferredLogits:
        if isinstance(given, bool) or not isinstance(given, int | float):
            _refuse(f"multiplied or divided by a {type(given).__name__}")
        return replace(self, scale=self.scale * factor)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse(f"passed to {getattr(function, '__name__', function)}")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse(f"asked for .{name}")

    def token_losses(self, labels: Tensor) -> Tensor:
        """The cross entropy of each token.

        Sends 12 (TP-1) bytes a token from each rank, and nothing backward.

        Args:
            labels: [s, b], of the whole vocabulary. Of a label that is none of its entries the loss is 0; Megatron
                leaves it to the loss mask to hide what its own loss says then.

        Returns:
            [s, b], fp32 (fp64 for fp64); differentiable.
        """
        what = HeadSpec(scale=self.scale)
        entries = self.tp.size * self.weight.shape[0]
        return tiled_token_losses(
            self.hidden,
            self.weight,
            labels.masked_fill((labels < 0) | (labels >= entries), what.ignore_index),
            tile_tokens=self.tile,
            what=what,
            bias_V=self.bias,
            vocabulary=self._vocabulary(),
        )

    @torch.no_grad()
    def predictions(self) -> Tensor:
        """The likeliest entry of the vocabulary for each token: [s, b], int64; the lowest of several.

        Makes each tile's logits once more, and sends 12 (TP-1) bytes a token from each rank.
        """
        flat = self.hidden.flatten(0, -2)
        best = torch.empty(flat.shape[0], dtype=torch.float32, device=flat.device)
        entry = torch.empty(flat.shape[0], dtype=torch.int64, device=flat.device)
        for here in tiles_of(flat.shape[0], self.tile):
            logits = torch.nn.functional.linear(flat[here], self.weight, self.bias)
            # A scale of 0 or less changes which one is the likeliest.
            highest, where = (logits * self.scale).max(-1)
            best[here], entry[here] = highest, where
        entry += self.tp.rank * self.weight.shape[0]
        if self.tp.size > 1:
            sender = Sender(self.tp, METHOD, "forward")
            counts = [flat.shape[0]] * self.tp.size
            bests, entries = (torch.stack(collect(x, counts, sender)) for x in (best, entry))
            entry = entries.gather(0, bests.argmax(0, keepdim=True)).squeeze(0)
        return entry.view(self.hidden.shape[:-1])

    def _vocabulary(self) -> Vocabulary | None:
        if self.tp.size == 1:
            return None
        here = self.weight.shape[0]
        sender = Sender(self.tp, METHOD, "forward")

        def merge(statistics: Tensor) -> Tensor:
            parts = collect(statistics.reshape(-1), [statistics.numel()] * self.tp.size, sender)
            return torch.stack(parts).view(self.tp.size, *statistics.shape)

        return Vocabulary(self.tp.rank * here, self.tp.size * here, merge)


def _refuse(what: str) -> NoReturn:
    raise UnsupportedError(
        setting="memory.tile_tokens",
        why=f"between the output layer and its loss the logits are {what}, and tiles know of scaling by numbers alone",
        remedy="leave tile_tokens out of the section that --sp-memory is given, or take that out of the model",
    )
