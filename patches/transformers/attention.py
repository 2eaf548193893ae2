"""The attention function that one model's attention layers call through Transformers' attention interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dsp_plugin.config.attention import attention_of
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import UnsupportedError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import Where
from dsp_plugin.patches.transformers.mask import SequenceMask
from dsp_plugin.patches.transformers.passes import ModelPass
from dsp_plugin.training.extents import Running
from dsp_plugin.training.randomness import RegionSeed

# What some families pass to attention beyond q, k and v, and what it would change.
ALTERING = {
    "softcap": "it bends the scores",
    "s_aux": "it adds a sink to the softmax",
    "position_bias": "it is added to the scores",
    "head_mask": "it weighs heads",
}


class SequenceAttention:
    """Runs a model's attention by a method.

    Attributes:
        calls: how many attention layers ran in the running forward pass.

    Args:
        passes: the model's.
    """

    def __init__(
        self, config: SequenceParallelConfig, groups: SequenceParallelGroups, passes: Running[ModelPass]
    ) -> None:
        self._attention = attention_of(config, config.for_softmax)
        self._groups, self._passes = groups, passes
        self.calls = 0

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: SequenceMask | Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention as the interface has it.

        Args:
            module: the attention layer.
            query: ``[B, H, n, D]`` of this rank's tokens, rotated by their global positions.
            key: ``[B, K, n, D]``.
            value: ``[B, K, n, Dv]``.
            attention_mask: what this layer got of the model's mask code. It decides about the window, as it does in
                Transformers' eager and sdpa attention, whatever `sliding_window` among ``kwargs`` says.

        Returns:
            ``[B, n, H, Dv]``, and no weights.

        Raises:
            UnsupportedError: a mask, or something else that changes the scores in a way that no method knows; or no
                forward pass of the model runs.
        """
        self.calls += 1
        _refuse_altered_scores(module, attention_mask, is_causal, kwargs)
        running = self._passes.now
        if running is None:
            raise UnsupportedError(
                setting=f"{type(module).__name__} with sequence_parallel",
                why="it was called outside of the model's forward, where nothing says which tokens this rank holds",
                remedy="call the model itself, not a part of it: without labels it returns whole logits",
            )
        assert isinstance(attention_mask, SequenceMask)
        placement = running.placement
        rows = placement.rows
        by_row = rows.documents_by_row
        if by_row is None and not attention_mask.causal:
            by_row = rows.apart
        out = self._attention(
            *(x.transpose(1, 2) for x in (query, key, value)),
            what=AttentionSpec(
                running.mask(attention_mask.causal, attention_mask.window),
                scaling,
                dropout,
                _dropout_seed(running.seed, module) if dropout else None,
                cu_seqlens_by_row=by_row,
            ),
            where=Where(self._groups, placement.layout),
        )
        if placement.blind is not None:
            out = out.masked_fill(placement.blind[..., None, None], 0)
        return out, None


def _dropout_seed(seed: RegionSeed | None, module: nn.Module) -> int:
    assert seed is not None, "Transformers' layers drop in training only"
    return seed.of_attention(f"layer {getattr(module, 'layer_idx', None)}")


def _refuse_altered_scores(
    module: nn.Module, attention_mask: object, is_causal: bool | None, kwargs: dict[str, Any]
) -> None:
    found = [(name, why) for name, why in ALTERING.items() if kwargs.get(name) is not None]
    if not isinstance(attention_mask, SequenceMask):
        made = "none" if attention_mask is None else "one of its own"
        found.append(("attention_mask", f"the model asked Transformers for no mask, it made {made}"))
    else:
        said = getattr(module, "is_causal", attention_mask.causal) if is_causal is None else is_causal
        if said is not attention_mask.causal:
            found.append((f"is_causal={said}", "the mask of the model says otherwise"))
    for name, why in found:
        raise UnsupportedError(
            f"{name} in {type(module).__name__} with sequence_parallel: {why}, which the methods do not know. "
            f"Use a model whose attention is softmax of scaled products under a causal or sliding-window mask."
        )
