"""Blocks over the tokens of a grid, on Megatron-core's tensor-parallel layers.

The same mathematics and the same names of parameters as the plain models have: projections are column- and
row-parallel, and heads are spread over tensor-parallel ranks. With ``--sequence-parallel``, norms and residuals work on
this rank's part of the tokens.

Shape suffixes: N is this rank's tokens, B batch, C model width; tokens come before the batch, as Megatron has them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dsp_plugin.models.video_dit import rotate
from dsp_plugin.patches.megatron.models.grid_tokens import Tokens
from dsp_plugin.patches.megatron.state_passing import recomputed


def column_linear(
    config: Any, inputs: int, outputs: int, *, bias: bool = True, disable_grad_reduce: bool = False
) -> nn.Module:
    """Megatron's `ColumnParallelLinear`: with ``sequence_parallel`` it gathers the tokens that it takes."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    linear: nn.Module = ColumnParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.init_method,
        bias=bias,
        gather_output=False,
        disable_grad_reduce=disable_grad_reduce,
    )
    return linear


def row_linear(config: Any, inputs: int, outputs: int) -> nn.Module:
    """Megatron's `RowParallelLinear`: with ``sequence_parallel`` it scatters the tokens that it returns."""
    from megatron.core.tensor_parallel import RowParallelLinear

    linear: nn.Module = RowParallelLinear(
        inputs,
        outputs,
        config=config,
        init_method=config.output_layer_init_method,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=False,
    )
    return linear


def on_whole(config: Any) -> Any:
    """The configuration for layers whose input is whole on every tensor-parallel rank: no tokens to gather."""
    config = copy.copy(config)
    config.sequence_parallel = False
    return config


def mark_partial(config: Any, module: nn.Module) -> nn.Module:
    """Marks the parameters of a module that sees this rank's part of the tokens: Megatron adds up their gradients."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return module


@dataclass(frozen=True)
class Place:
    """Where a block runs.

    Attributes:
        tokens: of this rank.
        sharded: the dim that is sharded there.
        along: the dim that the block computes along.
        rope: table of rotary positions along that dim, ``[L, D]`` in the order of the gathered tokens; None without.
        attention: of queries, keys and values ``[B, H, L, D]``; along the sharded dim a method has to serve it.
    """

    tokens: Tokens
    sharded: str
    along: str
    rope: Tensor | None
    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = F.scaled_dot_product_attention


class SelfAttention(nn.Module):
    """Attention along one dim of the tokens; this rank's heads."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.config, self.head_dim = config, width // heads
        self.qkv = column_linear(config, width, 3 * width, bias=False)
        self.out = row_linear(config, width, width)

    def forward(self, x_NBC: Tensor, place: Place) -> Tensor:
        """Returns [N, B, C]."""
        lengths = {dim: len(place.tokens.gathered(dim, place.sharded)) for dim in place.tokens.sizes}
        tokens = " ".join(lengths)
        lines = " ".join(dim for dim in lengths if dim != place.along)
        batched = f"({lines} b) h {place.along} d"
        qkv = self.qkv(x_NBC)[0]
        q, k, v = rearrange(qkv, f"({tokens}) b (h qkv d) -> qkv {batched}", qkv=3, d=self.head_dim, **lengths)
        if place.rope is not None:
            q, k = rotate(q, place.rope), rotate(k, place.rope)
        out = recomputed(self.config, self)(place.attention, q, k, v)
        del lengths[place.along]
        y: Tensor = self.out(rearrange(out, f"{batched} -> ({tokens}) b (h d)", **lengths))[0]
        return y


class Mlp(nn.ModuleDict):
    """The keys are places in the `nn.Sequential` of the plain models, so that parameters have their names."""

    def __init__(self, config: Any) -> None:
        super().__init__(
            {
                "0": column_linear(config, config.hidden_size, config.ffn_hidden_size),
                "2": row_linear(config, config.ffn_hidden_size, config.hidden_size),
            }
        )

    def forward(self, x_NBC: Tensor) -> Tensor:
        """Returns [N, B, C]."""
        y: Tensor = self["2"](F.gelu(self["0"](x_NBC)[0], approximate="tanh"))[0]
        return y


class TokenLayer(nn.ModuleDict):
    """One block after another, each behind the switch that it needs; blocks take tokens, a `Place`, and what else."""

    def __init__(self, config: Any, blocks: dict[str, nn.Module]) -> None:
        super().__init__(blocks)
        self.config = config

    def forward(self, x_NBC: Tensor, arrives: str, places: Sequence[Place], *others: Tensor) -> Tensor:
        """One layer.

        Args:
            x_NBC: tokens, with ``arrives`` sharded.
            places: where its blocks run.
            others: what every block takes besides, whole on every rank.

        Returns:
            ``[N, B, C]`` with the dim sharded of the last block.
        """

        def run(x: Tensor, *others: Tensor) -> Tensor:
            sharded = arrives
            for block, place in zip(self.values(), places, strict=True):
                x = block(place.tokens.switch(x, sharded, place.sharded), place, *others)
                sharded = place.sharded
            return x

        if self.config.recompute_granularity == "full" and self.training:
            from megatron.core import tensor_parallel

            out: Tensor = tensor_parallel.checkpoint(run, False, x_NBC, *others)
            return out
        return run(x_NBC, *others)
