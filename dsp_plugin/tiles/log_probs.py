"""Log-probabilities of tokens for losses that a script takes itself: DPO, GRPO, distillation by samples."""

from __future__ import annotations

from torch import Tensor

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.tiles.head import tiled_log_probs
from dsp_plugin.tiles.spec import HeadSpec, auto_tile_tokens


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tile_tokens: int | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probability of each label, without a tensor of [tokens, vocabulary]: logits exist tile by tile.

    They are ``cap(scale * (hidden @ weight.T + bias)) / temperature``, ``cap(x) = softcap * tanh(x / softcap)``,
    and are made again, tile by tile, for the gradients of hidden states, weight and bias. A token's number depends on
    its hidden state alone: inside a sharded model, call this on the tokens that the rank holds.

    Args:
        hidden: ``[..., E]``.
        weight: of the head, ``[V, E]``, whole: under ZeRO 3 and FSDP2 call this in the forward of a module that has it.
        labels: int64 ``[...]``, the token that follows each, shifted already.
        tile_tokens: tokens of a tile; None for as many as `auto_tile_tokens` says.
        bias: ``[V]``.
        temperature: above 0; divides what a soft cap leaves.
        scale: of logits, before a soft cap: a family's ``logit_scale``, or 1 / ``logits_scaling``.
        softcap: a family's ``final_logit_softcapping``.
        ignore_index: the label of tokens whose log-probability is 0.
        with_entropy: also return the entropy of each token's distribution.

    Returns:
        ``[...]`` in nats, in fp32, fp64 for fp64; with the entropies, ``[...]`` likewise, if they are asked for. Both
        are differentiable, once.

    Raises:
        SequenceParallelConfigError: shapes do not fit, or a temperature, cap or tile is not above 0.
    """
    for name, value in (("temperature", temperature), ("softcap", softcap)):
        if value is not None and not value > 0:
            raise SequenceParallelConfigError(
                setting=name, value=value, why="it divides logits", remedy="pass a number above 0, or leave it out"
            )
    # A cap c of logits that are then divided by t is a cap c / t of logits that are divided by t before.
    what = HeadSpec(
        scale=scale / temperature,
        softcap=None if softcap is None else softcap / temperature,
        ignore_index=ignore_index,
    )
    found, entropy = tiled_log_probs(
        hidden,
        weight,
        labels,
        tile_tokens=auto_tile_tokens(weight.shape[0]) if tile_tokens is None else tile_tokens,
        what=what,
        bias_V=bias,
        with_entropy=with_entropy,
    )
    return found if entropy is None else (found, entropy)
