"""What `dsp_plugin.models.vit.VisionTransformer` is made of, on Megatron-core's tensor-parallel layers.

The same mathematics and the same names of parameters, as in token_layers.py.

Shape suffixes are those of `dsp_plugin.models.vit`, with tokens before the batch, as Megatron has them: N is this
rank's tokens, I the variables of all samples.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from dsp_plugin.models.vit import Embedding
from dsp_plugin.patches.megatron.models.token_layers import (
    Mlp,
    Place,
    SelfAttention,
    TokenLayer,
    column_linear,
    mark_partial,
    row_linear,
)


class VariableAggregation(nn.Module):
    """One token out of the tokens of all variables in a patch; this rank's heads of the cross-attention."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.head_dim = width // heads
        self.norm = nn.LayerNorm(width)
        # Both take the same tokens: the gradient of these is reduced once, in `forward`.
        self.score = column_linear(config, width, heads, bias=False, disable_grad_reduce=True)
        self.value = column_linear(config, width, width, disable_grad_reduce=True)
        self.out = row_linear(config, width, width)

    def forward(self, x_NBVC: Tensor) -> Tensor:
        """Returns [N, B, C]."""
        from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

        batch, variables = x_NBVC.shape[1:3]
        # Megatron's linear layers take three dims at most.
        x_NIC = copy_to_tensor_model_parallel_region(self.norm(x_NBVC).flatten(1, 2))
        share = rearrange(self.score(x_NIC)[0], "n (b v) h -> n b v h", b=batch, v=variables).softmax(dim=-2)
        value = rearrange(self.value(x_NIC)[0], "n (b v) (h d) -> n b v h d", v=variables, d=self.head_dim)
        y: Tensor = self.out(torch.einsum("nbvh,nbvhd->nbhd", share, value).flatten(-2))[0]
        return y


def parallel_embedding(config: Any, plain: Embedding) -> nn.Module:
    """The embedding of pixels: heads of the aggregation are spread over tensor-parallel ranks.

    With ``--sequence-parallel`` it is the plain one, on this rank's part of the tokens. To spread heads there would
    gather the tokens of all variables, by far the largest activation.
    """
    if config.sequence_parallel:
        return mark_partial(config, plain)
    plain.aggregate = VariableAggregation(config)  # type: ignore[assignment]
    return plain


class Block(nn.Module):
    """Self-attention along one dim of the tokens, then an MLP, each on normed tokens and added to them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm_attn = mark_partial(config, nn.LayerNorm(config.hidden_size))
        self.norm_mlp = mark_partial(config, nn.LayerNorm(config.hidden_size))
        self.attn, self.mlp = SelfAttention(config), Mlp(config)

    def forward(self, x_NBC: Tensor, place: Place) -> Tensor:
        """Returns [N, B, C]."""
        x_NBC = x_NBC + self.attn(self.norm_attn(x_NBC), place)
        y: Tensor = x_NBC + self.mlp(self.norm_mlp(x_NBC))
        return y


def layer(config: Any, dims: tuple[str, ...]) -> TokenLayer:
    """One block for each dim that tokens have, named after it."""
    return TokenLayer(config, {dim: Block(config) for dim in dims})
