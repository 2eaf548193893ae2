"""A linear-attention layer for Megatron-core, in place of self-attention: whole sequences, or states passed by LASP.

With ``h`` hidden channels, of each of H value heads: ``q, k, v`` from one column-parallel projection, a short
convolution and SiLU; gates from the same projection; linear attention; an RMS norm and an output gate; a row-parallel
projection back. The rows of the first projection are ordered by key head, so tensor parallelism cuts it between heads
and a checkpoint loads at any tensor-parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.patches.megatron.state_passing import Sequence, check_linear_layer, recomputed, refuse_inputs, unit

_BETA = ("delta", "gated-delta", "kda")
_SCALAR = ("scalar", "gated-delta")
_VECTOR = ("vector", "kda")
# Of the time step of Mamba-2 and Gated DeltaNet: its range over the heads, and that of the rate it is multiplied by.
_STEPS = (1e-3, 1e-1)
_RATES = (1.0, 16.0)


@dataclass
class LinearAttentionSubmodules:
    """What the layer is built of.

    Attributes:
        in_proj: column-parallel, such as `ColumnParallelLinear` or `TELayerNormColumnParallelLinear`.
        out_proj: row-parallel.
    """

    in_proj: Any
    out_proj: Any


class LinearAttention(nn.Module):
    """Goes where a `TransformerLayer` has its ``self_attention``.

    Sizes are those that Megatron's `TransformerConfig` has for linear attention: ``linear_num_key_heads``,
    ``linear_num_value_heads``, ``linear_key_head_dim``, ``linear_value_head_dim`` and ``linear_conv_kernel_dim``.

    Args:
        config: Megatron's `TransformerConfig`.
        submodules: the projections.
        layer_number: counts from 1.
        decay: a name in `dsp_plugin.kernels.linear.DECAYS`. ``head`` is fixed: TransNormer's slopes, smaller in later
            layers; gates of the others are learned.
        convolution: whether queries, keys and values go through a short convolution.
        pg_collection: Megatron's process groups; `parallel_state`'s when None.
        transformer_layer: what else a `TransformerLayer` hands to attention is of no use here.

    Raises:
        SequenceParallelConfigError: an unknown decay, heads that do not divide, or context parallelism without
            ``--sp-method lasp``.
        UnsupportedError: groups that are not `parallel_state`'s.
    """

    def __init__(
        self,
        config: Any,
        submodules: LinearAttentionSubmodules,
        layer_number: int = 1,
        decay: str = "gated-delta",
        convolution: bool = True,
        pg_collection: Any = None,
        **transformer_layer: Any,
    ) -> None:
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.transformer.spec_utils import build_module

        super().__init__()
        if decay not in DECAYS:
            raise SequenceParallelConfigError(
                setting="decay", value=decay, why=f"decays are {', '.join(DECAYS)}", remedy="choose one of them"
            )
        self.config, self.decay, self.layer_number = config, decay, layer_number
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group = pg_collection.tp
        heads, key_heads = config.linear_num_value_heads, config.linear_num_key_heads
        check_linear_layer(config, pg_collection, heads=heads, key_heads=key_heads)
        self.heads = heads // self.tp_group.size()
        self.key_heads = key_heads // self.tp_group.size()
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim

        shared = heads // key_heads
        values = shared * self.value_dim
        self.rate_dim = self.key_dim if decay in _VECTOR else 1
        decays = self.rate_dim if decay in _SCALAR + _VECTOR else 0
        # For each key head: query, key and values; their gates; the output gate.
        self.qkv_dims = (self.key_dim, self.key_dim, values)
        self.gate_dims = (shared * decays, shared if decay in _BETA else 0)
        self.z_dim = values
        row = sum(self.qkv_dims) + sum(self.gate_dims) + self.z_dim
        shape = {"config": config, "bias": False, "is_expert": False, "tp_group": self.tp_group}
        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            key_heads * row,
            init_method=config.init_method,
            gather_output=False,
            skip_bias_add=False,
            tp_comm_buffer_name="qkv",
            **shape,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            heads * self.value_dim,
            config.hidden_size,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_comm_buffer_name="proj",
            **shape,
        )
        self.conv_weight = None
        if convolution:
            width = config.linear_conv_kernel_dim
            taps = torch.empty(key_heads * sum(self.qkv_dims), width)
            self.conv_weight = self._sharded(taps.uniform_(-(width**-0.5), width**-0.5))
        if decays:
            rates = torch.linspace(*_RATES, heads).log()
            steps = torch.linspace(math.log(_STEPS[0]), math.log(_STEPS[1]), heads * decays).exp()
            self.A_log = self._sharded(rates)
            # The inverse of softplus.
            self.dt_bias = self._sharded(steps + torch.log(-torch.expm1(-steps)))
        self.norm_weight = self._sharded(torch.ones(heads * self.value_dim))

    def _sharded(self, whole: Tensor) -> nn.Parameter:
        """This tensor-parallel rank's part of a parameter, which is drawn whole: the same model at any size."""
        part = whole.chunk(self.tp_group.size())[self.tp_group.rank()]
        parameter = nn.Parameter(part.to(device=torch.cuda.current_device(), dtype=self.config.params_dtype))
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.partition_dim = 0  # type: ignore[attr-defined]
        parameter.partition_stride = 1  # type: ignore[attr-defined]
        return parameter

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        **positions: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Linear attention of this rank's tokens to all before them.

        Args:
            hidden_states: ``[s/cp, b, h]``; with ``sequence_parallel``, ``[s/cp/tp, b, h]``.
            attention_mask: None, or True where hidden, which must be the future and nothing else.
            positions: rotary embeddings and the like, which linear attention does not use.

        Returns:
            Of the shape of ``hidden_states``, and the bias that is not yet added: none.

        Raises:
            UnsupportedError: packed sequences, a cache of inference, or a mask of other structure.
        """
        refuse_inputs(inference_context, packed_seq_params)
        projected = self.in_proj(hidden_states)[0].transpose(0, 1).unflatten(-1, (self.key_heads, -1))
        sequence = Sequence.of(self.config, projected.shape[1])
        sequence.check_mask(attention_mask)
        mixed, z = projected.split([projected.shape[-1] - self.z_dim, self.z_dim], -1)
        (mixed,) = sequence.in_order(mixed)
        qkv, rates, betas = mixed.split([sum(self.qkv_dims), *self.gate_dims], -1)
        q, k, v = self._convolved(sequence, qkv.flatten(2))
        if self.decay in _BETA:
            q, k = unit(q), unit(k)
        g, beta = self._decays(rates), betas.flatten(2).float().sigmoid() if self.decay in _BETA else None
        out = sequence.back(self._attend(sequence, q, k, v, g, beta))
        out = self._normalized(out) * F.silu(z.reshape(out.shape).float())
        out = out.to(hidden_states.dtype).flatten(2).transpose(0, 1).contiguous()
        projected_back: tuple[Tensor, Tensor | None] = self.out_proj(out)
        return projected_back

    def _convolved(self, sequence: Sequence, qkv_BnC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys ``[B, n, Hk, K]``, values ``[B, n, H, V]``."""
        if self.conv_weight is not None:
            qkv_BnC = sequence.convolve(qkv_BnC, self.conv_weight)
        q, k, v = F.silu(qkv_BnC).unflatten(-1, (self.key_heads, -1)).split(self.qkv_dims, -1)
        return q, k, v.reshape(*v.shape[:2], self.heads, self.value_dim)

    def _decays(self, rates: Tensor) -> Tensor | None:
        """Log decays in fp32, of the shape that the kind has."""
        if self.decay == "head":
            return self._slopes(rates.device)
        if self.decay not in _SCALAR + _VECTOR:
            return None
        rates = rates.reshape(*rates.shape[:2], self.heads, self.rate_dim)
        steps = F.softplus(rates.float() + self.dt_bias.float().view(self.heads, self.rate_dim))
        g = -self.A_log.float().exp().unsqueeze(-1) * steps
        return g if self.decay in _VECTOR else g.squeeze(-1)

    def _slopes(self, device: torch.device) -> Tensor:
        """TransNormer's, of this rank's heads: powers of 2 over the heads, smaller the later the layer."""
        first = self.tp_group.rank() * self.heads
        numbers = torch.arange(first + 1, first + self.heads + 1, device=device, dtype=torch.float32)
        depth = (self.layer_number - 1) / max(self.config.num_layers - 1, 1)
        return -torch.exp2(-8.0 * numbers / self.config.linear_num_value_heads) * (1 - depth + 1e-5)

    def _attend(
        self, sequence: Sequence, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None
    ) -> Tensor:
        gates = {name: gate for name, gate in (("g", g), ("beta", beta)) if gate is not None}

        def attention(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
            named = dict(zip(gates, given, strict=True))
            return sequence.attend(q, k, v, named.get("g"), named.get("beta"))

        return recomputed(self.config, self)(attention, q, k, v, *gates.values())

    def _normalized(self, out: Tensor) -> Tensor:
        """Each head by its own RMS, in fp32."""
        weight = self.norm_weight.float().view(self.heads, self.value_dim)
        return F.rms_norm(out.float(), (self.value_dim,), eps=self.config.layernorm_epsilon) * weight

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Sequence_[tuple[int, int, int]] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoints: loads at other tensor, context and pipeline sizes."""
        from megatron.core.transformer.utils import (
            ensure_metadata_has_dp_cp_group,
            make_sharded_tensors_for_checkpoint,
            sharded_state_dict_default,
        )

        metadata = ensure_metadata_has_dp_cp_group(metadata)
        # Every parameter of the layer's own is sharded along its first dim.
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(own, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            found |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
            )
        return found
