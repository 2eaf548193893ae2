"""Routing of `torch.nn.functional.scaled_dot_product_attention` calls to a method, inside chosen modules only."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import Layout
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import METHODS

LayoutNow = Callable[[], Layout | None]


class AttentionRoute:
    """Sends attention calls of one module to the method, as long as its sequence is sharded.

    Args:
        name: of the module, for errors.
        layout_now: the placement of the sequence in the running forward pass; None while it is whole.
    """

    def __init__(
        self, name: str, method: str, kernel: str, groups: SequenceParallelGroups, layout_now: LayoutNow
    ) -> None:
        self._name, self._kernel, self._groups, self._layout_now = name, kernel, groups, layout_now
        attention = METHODS[method].attention
        assert attention is not None, f"{method} replaces no attention"
        self._attention = attention

    def install(self, module: nn.Module) -> Callable[[], None]:
        """Route the calls made inside ``module.forward``; returns what undoes it."""
        original = module.forward

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            layout = self._layout_now()
            if layout is None:
                return original(*args, **kwargs)
            with _Intercept(self, layout):
                return original(*args, **kwargs)

        module.forward = forward

        def undo() -> None:
            module.forward = original

        return undo

    def attend(
        self,
        layout: Layout,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """`scaled_dot_product_attention` on sharded ``[B, H, n, D]`` tensors, with its arguments.

        Raises:
            UnsupportedError: a dense mask, or inputs that are not self-attention over the shard.
        """
        shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}"
        if attn_mask is not None:
            raise UnsupportedError(
                setting=f"attn_mask of {self._name}",
                value=tuple(attn_mask.shape),
                why="a dense mask is over whole sequences, of which a rank holds a part",
                remedy="use is_causal=True or no mask; pack documents with MaskSpec(cu_seqlens=...)",
            )
        if is_causal and layout.explicit_sizes is not None:
            raise UnsupportedError(
                setting=f"is_causal of {self._name}",
                value=is_causal,
                why="the stage computes along several dims of which one is sharded, so its tokens are not in global order",
                remedy="shard a dim that the stage does not compute along, or drop the mask",
            )
        if query.dim() != 4 or query.shape[2] != key.shape[2]:
            raise UnsupportedError(
                setting=f"attention of {self._name}",
                value=shapes,
                why="expected self-attention on [B, H, n, D], with as many keys as queries",
                remedy="leave cross-attention modules out of the attention globs",
            )
        if query.shape[1] != key.shape[1] and not enable_gqa:
            raise UnsupportedError(
                setting=f"attention of {self._name}",
                value=shapes,
                why="heads of query and key differ and enable_gqa is not set",
                remedy="pass enable_gqa=True, as torch itself demands",
            )
        out = self._attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            groups=self._groups,
            layout=layout,
            mask=MaskSpec(causal=is_causal),
            scale=scale,
            dropout_p=dropout_p,
            dropout_seed=_draw_seed() if dropout_p else None,
            kernel=self._kernel,
        )
        return out.transpose(1, 2)


def _draw_seed() -> int:
    """From torch's CPU generator, whose state activation checkpointing restores before it recomputes."""
    return int(torch.randint(2**62, (), device="cpu"))


class _Intercept(TorchFunctionMode):
    def __init__(self, route: AttentionRoute, layout: Layout) -> None:
        super().__init__()
        self._route, self._layout = route, layout

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._route.attend(self._layout, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
