"""What lies between a token's hidden state and its loss, and how much of the vocabulary a rank has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError

AUTO_LOGITS_BYTES = 512 << 20
"""What one tile of logits, in fp32, may take where the user left its size open."""


@dataclass(frozen=True)
class HeadSpec:
    """From hidden states to losses.

    Logits are ``cap(scale * (hidden @ weight.T + bias))``, and the loss of a token with label y, in w the weights of
    classes (1 where there are none), over V classes::

        (1 - label_smoothing) * w[y] * (lse - logits[y])
            + label_smoothing / V * sum over c of w[c] * (lse - logits[c])
            + z_loss * lse ** 2

    Attributes:
        scale: multiplies logits: 1 / temperature, a family's ``logit_scale``, or 1 / ``logits_scaling``.
        softcap: ``cap(x) = softcap * tanh(x / softcap)``; None for none.
        label_smoothing: as of `torch.nn.functional.cross_entropy`.
        z_loss: coefficient of the squared log-sum-exp.
        ignore_index: the label of tokens that cost nothing.
    """

    scale: float = 1.0
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100


@dataclass(frozen=True)
class Vocabulary:
    """This rank's part of a vocabulary that ranks with the same tokens share.

    Attributes:
        start: the first of its classes.
        size: V, of all ranks.
        merge: gathers ``[k, t]``, k numbers of each of t tokens, into ``[ranks, k, t]``; a collective.
    """

    start: int
    size: int
    merge: Callable[[Tensor], Tensor]


def auto_tile_tokens(classes: int) -> int:
    """Tokens of a tile whose logits over ``classes`` of this rank stay within `AUTO_LOGITS_BYTES`."""
    return max(AUTO_LOGITS_BYTES // (4 * classes), 1)


def tiles_of(tokens: int, tile_tokens: int) -> Iterator[slice]:
    """Cuts ``tokens`` into tiles.

    Raises:
        SequenceParallelConfigError: they are to be tiles of no tokens.
    """
    if tile_tokens < 1:
        raise SequenceParallelConfigError(
            setting="tile_tokens", value=tile_tokens, why="a tile has at least one token", remedy="write 4096, say"
        )
    return (slice(start, min(start + tile_tokens, tokens)) for start in range(0, tokens, tile_tokens))
