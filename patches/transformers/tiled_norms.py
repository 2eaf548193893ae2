"""Norms of a model of Transformers in tiles of tokens, wherever its MLPs are.

Transformers' RMS norms are written out in fp32: of a bf16 token of width E one keeps 6 E bytes for the backward pass
beside what it returns, and takes 18 E more on the way back. Where MLPs are in tiles and every layer is recomputed, that
is the most of what a token costs. A norm computes token by token, and in tiles keeps its input alone, which the
residual stream has anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.patches.transformers.overlay import Overlay
from dsp_plugin.patches.transformers.tiled_mlp import is_upstreams, mlps_of
from dsp_plugin.tiles.mlp import AUTO_MLP_BYTES, tile_count, tiled

# Bytes for each element of a token of a tile, where most of it is alive.
_ELEMENT_BYTES = 32


def norms_of(model: nn.Module) -> Iterator[nn.Module]:
    """Those that are written out: Transformers' own RMS norms, without gates."""
    for module in model.modules():
        if is_upstreams(module, lambda name: name.endswith("RMSNorm")):
            yield module


def tile_norms(model: nn.Module, config: SequenceParallelConfig, aside: Callable[[], bool], undo: ExitStack) -> None:
    """Have the model's norms computed in as many tiles as its MLPs. Call it before DeepSpeed has its hooks.

    Args:
        aside: whether the model now computes as its own methods do.
        undo: gets what takes it off.
    """
    tiles = None if config.memory == "auto" else config.memory.mlp_tiles
    if tiles == 1:
        return
    within = {part for mlp in mlps_of(model) for part in mlp.modules()}
    for norm in norms_of(model):
        if norm in within:
            # In tiles already.
            continue
        Overlay(norm, undo).replace("forward", TiledNorm(norm, norm.forward, tiles, aside))


class TiledNorm:
    """Stands in for the forward of a norm, on as many tokens as there are.

    Args:
        tiles: None for as few as keep each within `AUTO_MLP_BYTES`.
    """

    def __init__(
        self, norm: nn.Module, upstream: Callable[[Tensor], Tensor], tiles: int | None, aside: Callable[[], bool]
    ) -> None:
        self._norm, self._upstream, self._tiles, self._aside = norm, upstream, tiles, aside

    # A compiler would trace the tiles' gradients, which are taken in a backward pass within another.
    @torch.compiler.disable
    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the norm returns of ``[..., E]``."""
        tiles = self._tiles
        if tiles is None:
            tiles = tile_count(x[..., 0].numel(), _ELEMENT_BYTES * x.shape[-1], AUTO_MLP_BYTES)
        if tiles == 1 or args or kwargs or self._aside():
            return self._upstream(x, *args, **kwargs)
        return tiled(self._upstream, x, self._norm, tiles=tiles)
