"""The functions by which Transformers' layers carry something along the sequence, and what stands in for each.

A family is what its layers call: functions of Transformers that are torch code, or those of flash-linear-attention,
causal_conv1d or mamba_ssm where these are installed, by one name in the file of the model. What stands in takes the
same arguments, of this rank's tokens, and returns what the torch code does.

Shape suffixes as in the library: B batch, n tokens, H heads, K and V key and value dims, C channels, N states.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.kernels.merge import accumulation_dtype
from dsp_plugin.patches.transformers.mixing import SequenceMixing

Standin = Callable[..., Any]
# As Transformers' functions have it, and flash-linear-attention's.
_NORM_EPSILON = 1e-6


def convolution(
    mixing: SequenceMixing,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    """`causal_conv1d_fn`: ``[B, C, n]`` to ``[B, C, n]``, with an activation behind."""
    _refuse_cache("causal_conv1d_fn", kwargs, "initial_states", "return_final_states")
    x_BnC = hidden_states.to(weight.dtype).transpose(1, 2)
    out = _activated(mixing.convolve(x_BnC, weight, bias).transpose(1, 2), activation)
    return out.to(hidden_states.dtype)


def delta_rule(
    mixing: SequenceMixing,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`torch_chunk_gated_delta_rule`, decays ``[B, n, H]``, and `chunk_kimi_delta_attention`, ``[B, n, H, K]``.

    States decay before they are read and written, as in `dsp_plugin.linear_attention`.
    """
    _refuse_cache("the delta rule", kwargs, "initial_state", "output_final_state")
    if use_qk_l2norm_in_kernel:
        query, key = (_of_unit_length(x).to(value.dtype) for x in (query, key))
    return mixing.attend(query, key, value, g, beta, scale=None).to(query.dtype), None


def scalar_scan(
    mixing: SequenceMixing,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    **kwargs: Any,
) -> Tensor:
    """`mamba2_chunk_scan`, Mamba-2's (arXiv 2405.21060): states ``[B, H, N, V]`` that decay by ``exp(A dt)``.

    Args:
        hidden_states: ``[B, n, H, V]``.
        dt: ``[B, n, H]``.
        A, D, dt_bias: ``[H]``.
        B, C: ``[B, n, groups, N]``.
        chunk_size: of the torch code.
    """
    _refuse_cache("mamba2_chunk_scan", kwargs, "initial_states", "return_final_states", "z")
    steps = _steps(dt, dt_bias, dt_softplus).clamp(*dt_limit)
    x = hidden_states.to(steps.dtype)
    written = (x * steps.unsqueeze(-1)).to(hidden_states.dtype)
    out = mixing.attend(C, B, written, A.to(steps.dtype) * steps, None, scale=1.0).to(steps.dtype)
    return out if D is None else out + D.unsqueeze(-1) * x


def channel_scan(
    mixing: SequenceMixing,
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **kwargs: Any,
) -> Tensor:
    """`mamba_selective_scan`, Mamba's (arXiv 2312.00752): every channel is a head of value dim 1, with N decays.

    Args:
        hidden_states, dt, z: ``[B, C, n]``.
        A: ``[C, N]``.
        B, C: ``[B, N, n]``.
        D, delta_bias: ``[C]``.
    """
    _refuse_cache("mamba_selective_scan", kwargs, "return_last_state")
    steps_BnC = _steps(dt.transpose(1, 2), delta_bias, delta_softplus)
    x_BnC = hidden_states.transpose(1, 2).to(steps_BnC.dtype)
    read, write = (x.transpose(1, 2).unsqueeze(2).to(steps_BnC.dtype) for x in (C, B))
    decays = steps_BnC.unsqueeze(-1) * A.to(steps_BnC.dtype)
    out = mixing.attend(read, write, (x_BnC * steps_BnC).unsqueeze(-1), decays, None, scale=1.0).squeeze(-1)
    out = out.to(hidden_states.dtype).transpose(1, 2)
    if D is not None:
        out = out + hidden_states * D.unsqueeze(-1)
    return out if z is None else out * F.silu(z)


def no_shortcut(mixing: SequenceMixing, *args: Any, **kwargs: Any) -> None:
    """One kernel for a whole layer: as where there is none, the layer calls its parts."""


def lightning_attention(
    mixing: SequenceMixing, layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """`MiniMaxLightningAttention.forward`, which calls nothing to compute its states, with the layer's parameters."""
    _refuse_cache("MiniMaxLightningAttention", kwargs, "cache", "past_key_values")
    packed = layer.act_fn(layer.qkv_proj(hidden_states)).unflatten(-1, (layer.num_attention_heads, -1))
    decays = -layer.slope_rate.flatten()
    out = mixing.attend(*packed.split(layer.head_dim, -1), decays, None, scale=1.0)
    out = layer.norm(out.flatten(2).to(hidden_states.dtype))
    return layer.out_proj(layer.output_gate(hidden_states).sigmoid() * out), None


# By the names of the functions in the files of models.
CONVOLUTIONS: dict[str, Standin] = {"causal_conv1d_fn": convolution}
LINEAR: dict[str, Standin] = {
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": scalar_scan,
    "mamba_selective_scan": channel_scan,
}
SHORTCUTS: dict[str, Standin] = {
    "mamba2_split_conv1d_scan_combined": no_shortcut,
    "mamba_inner_fn": no_shortcut,
}
# By the names of layers that compute everything in forward.
WHOLE_LAYERS: dict[str, Standin] = {"MiniMaxLightningAttention": lightning_attention}


def _activated(x: Tensor, activation: str | None) -> Tensor:
    from transformers.activations import ACT2FN

    return x if activation is None else ACT2FN[activation](x)


def _of_unit_length(x: Tensor) -> Tensor:
    x = x.to(accumulation_dtype(x.dtype))
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _NORM_EPSILON)


def _steps(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """The size of the step at each token, in fp32 or wider, as the kernels have it."""
    steps = dt.to(accumulation_dtype(dt.dtype))
    if bias is not None:
        steps = steps + bias.to(steps.dtype)
    return F.softplus(steps) if softplus else steps


def _refuse_cache(what: str, kwargs: dict[str, Any], *names: str) -> None:
    for name in names:
        value = kwargs.get(name)
        if isinstance(value, Tensor) or value:
            raise UnsupportedError(
                setting=f"{name} of {what} with sequence_parallel",
                value=tuple(value.shape) if isinstance(value, Tensor) else value,
                why="states go on from the tokens of one forward pass to those of the next, of which ranks hold parts",
                remedy="pass whole sequences without a cache; to generate, call the model's generate",
            )


def named_by(part: nn.Module) -> frozenset[str]:
    """Which of these functions a layer's forward names, or the layer itself."""
    code = getattr(inspect.unwrap(type(part).forward), "__code__", None)
    named = set() if code is None else set(code.co_names)
    kinds = {kind.__name__ for kind in type(part).__mro__}
    return frozenset((named & {*CONVOLUTIONS, *LINEAR, *SHORTCUTS}) | (kinds & set(WHOLE_LAYERS)))
