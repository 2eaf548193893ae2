"""Megatron's own `GatedDeltaNet` by state passing, under ``--sp-method lasp`` and more than one context-parallel rank.

Upstream exchanges heads for tokens around the layer (0.19) or has no context parallelism (0.16). Its projections,
parameters and checkpoint format stay; what is replaced is the computation between the projections, of which the
convolution needs a few tokens of the rank before and the gated delta rule its state. flash-linear-attention, without
which upstream does not build the layer, is not needed.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dsp_plugin.methods import METHODS
from dsp_plugin.patches.megatron.state import MegatronState
from dsp_plugin.patches.megatron.state_passing import Sequence, check_linear_layer, recomputed, refuse_inputs, unit
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch

_LAYER = "megatron.core.ssm.gated_delta_net:GatedDeltaNet"
_VARIANT = "gated_delta_net"


def patches(state: MegatronState) -> tuple[Patch, ...]:
    """None unless the method passes states."""
    if METHODS[state.settings.method].kind != "linear":
        return ()

    def patch(name: str, target: str, make: Callable[[Any], object], parameters: tuple[str, ...]) -> Patch:
        return Patch(f"megatron gated delta net: {name}", target, DISTRIBUTION, SUPPORTED, make, parameters)

    config = "megatron.core.transformer.transformer_config:TransformerConfig.__post_init__"
    return (
        patch("configuration", config, _configure, ("self",)),
        patch("build", f"{_LAYER}.__init__", _build, ("self", "config", "submodules", "pg_collection")),
        patch("forward", f"{_LAYER}.forward", _pass_states, ("self", "hidden_states", "attention_mask")),
    )


def _configure(upstream: Callable[..., None]) -> Callable[..., None]:
    """Upstream's checks of the layer without those of its own context parallelism, which is none or one by heads."""

    @functools.wraps(upstream)
    def __post_init__(self: Any) -> None:  # noqa: N807
        size = self.context_parallel_size
        if self.experimental_attention_variant == _VARIANT:
            self.context_parallel_size = 1
        try:
            upstream(self)
        finally:
            self.context_parallel_size = size

    return __post_init__


def _build(upstream: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N807
        call = signature.bind(*args, **kwargs)
        config = call.arguments["config"]
        if config.context_parallel_size == 1:
            return upstream(*args, **kwargs)
        check_linear_layer(
            config,
            call.arguments.get("pg_collection"),
            heads=config.linear_num_value_heads,
            key_heads=config.linear_num_key_heads,
        )
        home = sys.modules[upstream.__module__]
        installed = home.HAVE_FLA
        home.HAVE_FLA = True  # type: ignore[attr-defined]
        try:
            return upstream(*args, **kwargs)
        finally:
            home.HAVE_FLA = installed  # type: ignore[attr-defined]

    return __init__


def _pass_states(upstream: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(upstream)
    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if self.config.context_parallel_size == 1:
            named = {"inference_context": inference_context, "packed_seq_params": packed_seq_params}
            out: tuple[Tensor, Tensor | None] = upstream(self, hidden_states, attention_mask, *args, **named, **kwargs)
            return out
        refuse_inputs(inference_context, packed_seq_params)
        projected = self.in_proj(hidden_states)[0].transpose(0, 1)
        sequence = Sequence.of(self.config, projected.shape[1])
        sequence.check_mask(attention_mask)
        qk, values, heads = (n // self.tp_size for n in (self.qk_dim, self.v_dim, self.num_value_heads))
        qkv, gate, gates = projected.split([2 * qk + values, values, 2 * heads], -1)
        qkv, gates = sequence.in_order(qkv, gates)
        weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
        q, k, v = self.act_fn(sequence.convolve(qkv, weight, bias)).split([qk, qk, values], -1)
        q, k = (x.unflatten(-1, (-1, self.key_head_dim)) for x in (q, k))
        if self.use_qk_l2norm:
            q, k = unit(q), unit(k)
        v = v.unflatten(-1, (-1, self.value_head_dim))
        beta, alpha = gates.float().split([heads, heads], -1)
        g = -self.A_log.float().exp() * F.softplus(alpha + self.dt_bias.float())
        out = recomputed(self.config, self)(sequence.attend, q, k, v, g, beta.sigmoid())
        return _project(self, sequence.back(out), gate)

    return forward


def _project(layer: Any, out: Tensor, gate: Tensor) -> tuple[Tensor, Tensor | None]:
    """The end of the layer; with ``gdn_norm_out`` among the modules to recompute, its norm is, as upstream has it."""
    normalized = functools.partial(_normalized, layer)
    if not getattr(layer, "recompute_norm_out", False):
        result: tuple[Tensor, Tensor | None] = layer.out_proj(normalized(out, gate))
        return result
    from megatron.core import tensor_parallel

    checkpoint = tensor_parallel.CheckpointWithoutOutput()
    result = layer.out_proj(checkpoint.checkpoint(normalized, out, gate))
    checkpoint.discard_output_and_register_recompute(result[0])
    return result


def _normalized(layer: Any, out: Tensor, gate: Tensor) -> Tensor:
    """The layer's gated norm of ``[b, s, h, d]``, as ``[s, b, h * d]``."""
    normalized = layer._apply_gated_norm(out, gate.reshape(out.shape))
    result: Tensor = normalized.view(*out.shape[:2], -1).transpose(0, 1).contiguous()
    return result
