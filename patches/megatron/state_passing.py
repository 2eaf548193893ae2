"""What linear-attention layers ask of a sequence, whole on this rank or sharded over context-parallel ranks.

Both `LinearAttention` and Megatron's own `GatedDeltaNet` run on it: a short convolution, then linear attention, over
tokens in the order of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsp_plugin.comm.relayout import relayout
from dsp_plugin.config.attention import attention_of
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.kernels.convolution import short_convolution
from dsp_plugin.kernels.linear import linear_attention
from dsp_plugin.layout import Layout
from dsp_plugin.methods import METHODS, Where
from dsp_plugin.methods.halo import convolve
from dsp_plugin.patches.megatron.attention import check_groups
from dsp_plugin.patches.megatron.mask import check_mask
from dsp_plugin.patches.megatron.parallel_state import registered_state
from dsp_plugin.patches.megatron.recompute import check_checkpoints
from dsp_plugin.patches.megatron.state import MegatronState, order_of

TOKENS = 1


def check_linear_layer(config: Any, process_groups: Any, *, heads: int, key_heads: int) -> None:
    """Refuses a linear-attention layer that could not run; to be called where one is built.

    Args:
        config: Megatron's `TransformerConfig`.
        process_groups: the layer's ``pg_collection``.
        heads: value heads of the whole model; likewise ``key_heads``.

    Raises:
        SequenceParallelConfigError: heads that do not split over tensor-parallel ranks, or context parallelism without
            a method that passes states.
        UnsupportedError: the layer is built on other groups than Megatron's.
    """
    ranks = config.tensor_model_parallel_size
    if heads % key_heads or key_heads % ranks:
        raise SequenceParallelConfigError(
            setting="linear_num_key_heads",
            value=key_heads,
            why=f"each of {key_heads} key heads serves an equal part of the {heads} value heads, on one of {ranks} "
            f"tensor-parallel ranks: {heads} / {key_heads} leaves {heads % key_heads}, {key_heads} / {ranks} leaves "
            f"{key_heads % ranks}",
            remedy="choose head counts that divide",
        )
    if config.context_parallel_size == 1:
        return
    state = registered_state()
    if state is None or METHODS[state.settings.method].kind != "linear":
        raise SequenceParallelConfigError(
            setting="context_parallel_size",
            value=config.context_parallel_size,
            why="a linear-attention layer over a sharded sequence hands its state from rank to rank, which "
            + ("needs the plugin" if state is None else f"--sp-method {state.settings.method} does not do"),
            remedy="start the script with `python -m dsp_plugin.launch` and --sp-method lasp; softmax layers of the "
            "same model run what --sp-softmax-method names",
        )
    check_groups(state, config, process_groups)
    check_checkpoints(state, config)


def refuse_inputs(inference_context: Any, packed_seq_params: Any) -> None:
    """Refuses what a training step over one unpacked sequence does not have.

    Raises:
        UnsupportedError: a cache of inference, or packed sequences.
    """
    if packed_seq_params is not None:
        raise UnsupportedError(
            setting="packed_seq_params",
            value=getattr(packed_seq_params, "qkv_format", "thd"),
            why="Megatron cuts packed sequences document by document, and a state would pass their borders",
            remedy="train on unpacked sequences",
        )
    if inference_context is not None:
        raise UnsupportedError(
            setting="inference_context",
            value=type(inference_context).__name__,
            why="the layer keeps no state between calls",
            remedy="evaluate whole sequences, without a cache",
        )


@dataclass(frozen=True)
class Sequence:
    """The tokens of one call of a layer.

    Attributes:
        tokens: where this rank's lie, in Megatron's order.
        state: the plugin's; None where the whole sequence is on this rank.
    """

    tokens: Layout
    state: MegatronState | None = None

    @classmethod
    def of(cls, config: Any, local_tokens: int) -> Sequence:
        """The sequence of which this rank holds ``local_tokens`` tokens.

        Args:
            config: the layer's `TransformerConfig`, checked by `check_linear_layer`.
        """
        if config.context_parallel_size == 1:
            return cls(Layout("contiguous", local_tokens, 1))
        state = registered_state()
        assert state is not None, "the plugin was uninstalled under a living model"
        assert state.config is not None, "model parallelism was destroyed under a living model"
        return cls(Layout(order_of(state.config), local_tokens * state.config.size, state.config.size), state)

    @property
    def runs(self) -> Layout:
        """One run of tokens for each rank: the order in which states are passed."""
        return Layout("contiguous", self.tokens.length, self.tokens.size)

    def check_mask(self, attention_mask: Tensor | None) -> None:
        """Refuses a dense mask that hides more than the future; a state reads all that came before.

        Raises:
            UnsupportedError: it does, on every rank.
        """
        if attention_mask is not None:
            check_mask(attention_mask, True, self.tokens, self.state)

    def in_order(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """``[B, n, ...]`` in Megatron's order, as runs of tokens."""
        return self._moved(tensors, self.tokens, self.runs)

    def back(self, x: Tensor) -> Tensor:
        """A run of tokens ``[B, n, ...]``, in Megatron's order."""
        return self._moved((x,), self.runs, self.tokens)[0]

    def _moved(self, tensors: tuple[Tensor, ...], source: Layout, target: Layout) -> tuple[Tensor, ...]:
        if self.state is None or source.kind == target.kind:
            return tensors
        assert self.state.groups is not None
        return relayout(tensors, TOKENS, source, target, axis=self.state.groups.lasp, method="lasp")

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A causal depthwise convolution of a run of tokens ``[B, n, C]`` with taps ``[C, W]``."""
        if self.state is None:
            return short_convolution(x, weight, bias)
        return convolve(x, weight, bias, groups=self.state.groups, layout=self.runs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None) -> Tensor:
        """Causal linear attention of runs of tokens; arguments as in `dsp_plugin.kernels.linear.linear_attention`."""
        if self.state is None:
            out = linear_attention(q, k, v, g, beta)
        else:
            out = attention_of(self.state.config)(q, k, v, g, beta, where=Where(self.state.groups, self.runs))
        assert isinstance(out, Tensor)
        return out


def unit(x: Tensor) -> Tensor:
    """Vectors along the last dim brought to unit length, as delta rules want their keys."""
    return (x * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def recomputed(config: Any, module: torch.nn.Module) -> Callable[..., Tensor]:
    """How to call the attention of a layer: through Megatron's checkpoint under selective recomputation.

    Returns:
        A function that takes the attention and its tensors.
    """
    selective = config.recompute_granularity == "selective" and "core_attn" in (config.recompute_modules or ())

    def call(attention: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        if not (selective and module.training):
            return attention(*tensors)
        from megatron.core import tensor_parallel

        out: Tensor = tensor_parallel.checkpoint(attention, False, *tensors)
        return out

    return call
