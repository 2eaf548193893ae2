"""The head of a language model and its loss, tile by tile: no tensor of [tokens, vocabulary] exists.

Logits are most of what a token costs where every layer is recomputed: 4 bytes and more for each word. Here a tile of
tokens has its logits, losses and gradients before the next tile has any. Hidden states, weight and bias are inputs like
any other, and their gradients come out once: hooks on parameters fire once, and no framework needs to be told.

`tiled_loss` adds losses up, so that gradients are known but for a factor and are computed along with the losses: three
products with the weight, as without tiles. `tiled_token_losses` and `tiled_log_probs` give numbers per token, whose
gradients come later: tiles are then made again, a fourth product, without what ranks had to tell each other.

Gradients of weight and bias are accumulated in fp32 (fp64 for fp64). Under autocast products are in its dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsp_plugin.derivatives import once_differentiable, refuse_transforms
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.tiles.logits import Head, Tile
from dsp_plugin.tiles.spec import HeadSpec, Vocabulary, tiles_of

# Of a product of a tile that is added to a weight's gradient, in elements.
_PRODUCT = 1 << 26
_DEFAULT = HeadSpec()


def tiled_loss(
    hidden: Tensor,
    weight_VE: Tensor,
    labels: Tensor,
    *,
    tile_tokens: int,
    what: HeadSpec = _DEFAULT,
    bias_V: Tensor | None = None,
    class_weights_V: Tensor | None = None,
    token_weights: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
) -> Tensor:
    """The sum of tokens' losses.

    Args:
        hidden: ``[..., E]``.
        weight_VE: of the head, ``[V, E]``.
        labels: int64 ``[...]``.
        tile_tokens: tokens of a tile.
        what: from hidden states to losses.
        bias_V: ``[V]``.
        class_weights_V: ``[V]``, of the classes; not differentiated, and not for a part of a vocabulary.
        token_weights: ``[...]``, of the tokens; not differentiated.
        vocabulary: the rank's part of it. Gradients of hidden states are then the rank's part of a sum over its ranks.

    Returns:
        Scalar in fp32, fp64 for fp64; 0 of no tokens.

    Raises:
        SequenceParallelConfigError: shapes do not fit.
    """
    _check(hidden, weight_VE, labels, bias_V, token_weights)
    differentiated = (hidden, weight_VE, bias_V) if torch.is_grad_enabled() else _detached(hidden, weight_VE, bias_V)
    return _SummedLoss.apply(*differentiated, labels, class_weights_V, token_weights, tile_tokens, what, vocabulary)


def tiled_token_losses(
    hidden: Tensor,
    weight_VE: Tensor,
    labels: Tensor,
    *,
    tile_tokens: int,
    what: HeadSpec = _DEFAULT,
    bias_V: Tensor | None = None,
    class_weights_V: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
) -> Tensor:
    """Each token's loss, ``[...]``, 0 where the label is ignored; otherwise as `tiled_loss`."""
    _check(hidden, weight_VE, labels, bias_V)
    losses, _ = _PerToken.apply(
        hidden, weight_VE, bias_V, labels, class_weights_V, tile_tokens, what, vocabulary, False
    )
    return losses


def tiled_log_probs(
    hidden: Tensor,
    weight_VE: Tensor,
    labels: Tensor,
    *,
    tile_tokens: int,
    what: HeadSpec = _DEFAULT,
    bias_V: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Each token's log-probability of its label, and the entropy of its distribution.

    Args:
        what: its scale and soft cap; probabilities know nothing of a loss.
        with_entropy: whether the entropy is computed, which costs a second tensor of a tile's size.

    Returns:
        ``[...]`` each, in nats, both differentiable; log-probabilities are 0 where the label is ignored. None for an
        entropy that was not asked for.
    """
    _check(hidden, weight_VE, labels, bias_V)
    if what.label_smoothing or what.z_loss:
        raise SequenceParallelConfigError(
            setting="what", value=what, why="a log-probability is not smoothed, and has no z-loss", remedy="drop these"
        )
    losses, entropy = _PerToken.apply(
        hidden, weight_VE, bias_V, labels, None, tile_tokens, what, vocabulary, with_entropy
    )
    return -losses, entropy


class _SummedLoss(torch.autograd.Function):
    """Gradients of the sum, computed with it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        class_weights: Tensor | None,
        token_weights: Tensor | None,
        tile_tokens: int,
        what: HeadSpec,
        vocabulary: Vocabulary | None,
    ) -> Tensor:
        head = _head(hidden, weight, bias, what, class_weights, vocabulary)
        grads = _Gradients(head, hidden, weight, bias, ctx.needs_input_grad)
        rows, tokens = _rows(hidden), labels.reshape(-1)
        factors = None if token_weights is None else token_weights.detach().reshape(-1).to(head.wide)
        # In fp64, as many tiles may follow.
        total = hidden.new_zeros((), dtype=torch.float64)
        for tile in tiles_of(len(tokens), tile_tokens):
            rows_t = rows[tile].to(head.weight.dtype)
            found = Tile.of(head, rows_t, tokens[tile])
            factor = torch.ones_like(found.loss) if factors is None else factors[tile]
            total += torch.dot(found.loss, factor)
            if grads.wanted:
                grads.add(tile, rows_t, found.gradient(factor))
            # Before the next one is made.
            del found
        ctx.save_for_backward(*grads.found())
        ctx.shape, ctx.dtypes = hidden.shape, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total.to(head.wide)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias = (
            None if found is None else torch.mul(found, grad, out=torch.empty_like(found, dtype=dtype))
            for found, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None if hidden is None else hidden.view(ctx.shape), weight, bias, *(None,) * 6


class _PerToken(torch.autograd.Function):
    """Losses and entropies of tokens; their tiles are made again for the gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        class_weights: Tensor | None,
        tile_tokens: int,
        what: HeadSpec,
        vocabulary: Vocabulary | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.products = _product_dtype(hidden)
        head = _head(hidden, weight, bias, what, class_weights, vocabulary, with_entropy)
        rows, tokens = _rows(hidden), labels.reshape(-1)
        losses = hidden.new_empty(len(tokens), dtype=head.wide)
        lse = torch.empty_like(losses)
        entropies = torch.empty_like(losses) if with_entropy else None
        for tile in tiles_of(len(tokens), tile_tokens):
            found = Tile.of(head, rows[tile].to(head.weight.dtype), tokens[tile])
            losses[tile], lse[tile] = found.loss, found.lse
            if entropies is not None:
                assert found.entropy is not None
                entropies[tile] = found.entropy
            del found
        ctx.save_for_backward(hidden, weight, bias, labels, class_weights, lse, entropies)
        ctx.rest = tile_tokens, what, vocabulary, with_entropy
        ctx.set_materialize_grads(False)
        return losses.view(labels.shape), None if entropies is None else entropies.view(labels.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_losses: Tensor | None, of_entropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, class_weights, lse, entropies = ctx.saved_tensors
        tile_tokens, what, vocabulary, with_entropy = ctx.rest
        if of_losses is None and of_entropies is None:
            return (None,) * 9
        head = _head(hidden, weight, bias, what, class_weights, vocabulary, with_entropy, ctx.products)
        grads = _Gradients(head, hidden, weight, bias, ctx.needs_input_grad)
        rows, tokens = _rows(hidden), labels.reshape(-1)
        by_loss = torch.zeros_like(tokens, dtype=head.wide) if of_losses is None else of_losses.reshape(-1)
        by_entropy = None if of_entropies is None else of_entropies.reshape(-1)
        for tile in tiles_of(len(tokens), tile_tokens):
            rows_t = rows[tile].to(head.weight.dtype)
            known = None if entropies is None else entropies[tile]
            found = Tile.again(head, rows_t, tokens[tile], lse[tile], known)
            grads.add(tile, rows_t, found.gradient(by_loss[tile], None if by_entropy is None else by_entropy[tile]))
            del found
        of_hidden, of_weight, of_bias = grads.found()
        return (
            None if of_hidden is None else of_hidden.view(hidden.shape),
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            *(None,) * 6,
        )


class _Gradients:
    """Those of hidden states, weight and bias as tiles add to them; None for one that nobody needs.

    Attributes:
        wanted: whether any is needed.
    """

    def __init__(self, head: Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: Any) -> None:
        self.wanted = any(needed[:3])
        self._head = head
        self._hidden = torch.empty_like(_rows(hidden)) if needed[0] else None
        self._weight = torch.zeros_like(weight, dtype=head.wide) if needed[1] else None
        self._bias = torch.zeros_like(bias, dtype=head.wide) if needed[2] and bias is not None else None

    def add(self, tile: slice, rows_tE: Tensor, of_logits_tV: Tensor) -> None:
        """Adds one tile's."""
        if self._bias is not None:
            self._bias += of_logits_tV.sum(0)
        narrow = of_logits_tV.to(self._head.weight.dtype)
        if self._hidden is not None:
            self._hidden[tile] = narrow @ self._head.weight
        if self._weight is not None:
            _add_product(self._weight, of_logits_tV, narrow, rows_tE)

    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states ``[tokens, E]`` in their dtype, of weight and bias in the wide one."""
        return self._hidden, self._weight, self._bias


def _add_product(total_VE: Tensor, wide_tV: Tensor, narrow_tV: Tensor, rows_tE: Tensor) -> None:
    """Adds ``narrow.T @ rows``, which is summed in the wide dtype and never rounded to a narrower one."""
    if rows_tE.dtype == total_VE.dtype:
        total_VE.addmm_(narrow_tV.t(), rows_tE)
    elif not total_VE.is_cuda:
        # No other device has products wider than their factors.
        total_VE.addmm_(narrow_tV.t().to(total_VE.dtype), rows_tE.to(total_VE.dtype))
    else:
        classes = max(_PRODUCT // total_VE.shape[1], 1)
        for part in tiles_of(len(total_VE), classes):
            total_VE[part] += torch.mm(narrow_tV[:, part].t(), rows_tE, out_dtype=total_VE.dtype)


def _head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    what: HeadSpec,
    class_weights: Tensor | None,
    vocabulary: Vocabulary | None,
    with_entropy: bool = False,
    products: torch.dtype | None = None,
) -> Head:
    assert class_weights is None or vocabulary is None, "weights of classes are for a whole vocabulary"
    products = products or _product_dtype(hidden)
    wide = torch.promote_types(products, torch.float32)
    return Head(
        weight.detach().to(products),
        None if bias is None else bias.detach().to(products),
        what,
        None if class_weights is None else class_weights.detach().to(wide),
        vocabulary,
        with_entropy,
    )


def _product_dtype(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _rows(hidden: Tensor) -> Tensor:
    return hidden.detach().reshape(-1, hidden.shape[-1])


def _detached(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    # Asked for no gradient, a function is still told that its inputs need one.
    return tuple(None if x is None else x.detach() for x in tensors)


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, token_weights: Tensor | None = None
) -> None:
    refuse_transforms("the tiled head", hidden, weight, bias)
    shapes = {"labels": (labels.shape, hidden.shape[:-1]), "weight": (weight.shape[1:], hidden.shape[-1:])}
    if bias is not None:
        shapes["bias"] = bias.shape, weight.shape[:1]
    if token_weights is not None:
        shapes["token_weights"] = token_weights.shape, labels.shape
    for name, (found, wanted) in shapes.items():
        if found != wanted:
            raise SequenceParallelConfigError(
                setting=name,
                value=tuple(found),
                why=f"hidden states are {tuple(hidden.shape)} and the head's weight {tuple(weight.shape)}, so it must "
                f"be {tuple(wanted)}" + (" after its first dim" if name == "weight" else ""),
                remedy="pass hidden states [..., E], a weight [V, E] and labels [...]",
            )
