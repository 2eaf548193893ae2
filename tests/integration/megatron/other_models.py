"""The core-only script with another model in place of its GPT: ``other_models.py MODEL ARGS``; see `main`."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from dsp_plugin.launch.examples import pretrain_gpt_core as script
from dsp_plugin.patches.megatron.linear_specs import linear_layer_spec


def hybrid_model(config: Any, layer: ModuleSpec, *, mtp_block_spec: None, pattern: str = "*-", **settings: Any) -> Any:
    """A `HybridModel` of layers as ``pattern`` says, over and over: attention (``*``), MLP (``-``), linear (``G``).

    Its parts are those of the local GPT layer, and it has no last norm, which is Transformer Engine's there.
    """
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.ssm.mlp_layer import MLPLayer

    parts = layer.submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=parts.input_layernorm, self_attention=parts.self_attention, self_attn_bda=parts.self_attn_bda
    )
    mlp = TransformerLayerSubmodules(pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda)
    softmax = ModuleSpec(module=TransformerLayer, submodules=attention)
    stack = HybridStackSubmodules(
        attention_layer=softmax,
        gdn_layer=linear_layer_spec(softmax),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
    )
    spec = ModuleSpec(module=HybridStack, params={"post_layer_norm": False}, submodules=stack)
    return HybridModel(config, spec, hybrid_layer_pattern=pattern * (config.num_layers // len(pattern)), **settings)


class DotProductAttention(torch.nn.Module):
    """Dense causal attention for the unsharded reference: Megatron's of this name cannot be built by an MLA layer."""

    def __init__(self, config: Any, layer_number: int, *args: Any, softmax_scale: float, **kwargs: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attention over ``[s, b, h, d]``, as ``[s, b, h * dv]``."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        logits = q @ k.transpose(-1, -2) * self.scale
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        return (logits.masked_fill(future, -torch.inf).softmax(-1) @ v).permute(2, 0, 1, 3).flatten(2)


def mla_layer() -> ModuleSpec:
    """A layer of multi-latent attention, whose keys and values differ in head dim."""
    layer = get_gpt_layer_local_spec(multi_latent_attention=True)
    layer.submodules.self_attention.submodules.core_attention = DotProductAttention
    return layer


def gated_delta_layer() -> ModuleSpec:
    """A layer with Megatron's own `GatedDeltaNet` on the local backend.

    Its decays are mild: upstream's rule in plain torch adds them up in fp32, and gradients of strong ones are lost.
    """
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules

    layer = get_gpt_layer_local_spec()
    parts = layer.submodules
    layer.submodules.self_attention = ModuleSpec(
        module=GatedDeltaNet,
        params={"A_init_range": (0.01, 0.1)},
        submodules=GatedDeltaNetSubmodules(
            in_proj=parts.self_attention.submodules.linear_qkv,
            out_norm=parts.input_layernorm,
            out_proj=parts.self_attention.submodules.linear_proj,
        ),
    )
    return layer


def without_flash_linear_attention() -> None:
    """Lets upstream build and run the layer where flash-linear-attention is not: it needs a norm of it, always."""
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet

    for owner in GatedDeltaNet.__mro__[:2]:
        home = vars(sys.modules[owner.__module__])
        if "HAVE_FLA" in home:
            home["HAVE_FLA"] = True
            home["l2norm"] = lambda x: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def main() -> None:
    """Trains the model that the first argument names."""
    kind = sys.argv.pop(1)
    if kind == "hybrid":
        script.GPTModel = hybrid_model
    elif kind == "linear-hybrid":
        script.GPTModel = partial(hybrid_model, pattern="G-*-")
    elif kind == "gdn":
        # Megatron's configuration insists on a number, also where a spec gives every layer the same attention.
        sys.argv += ["--softmax-every", "2"]
        script.get_gpt_layer_local_spec = gated_delta_layer
        script.TransformerConfig = partial(
            TransformerConfig,
            experimental_attention_variant="gated_delta_net",
            deterministic_mode=True,
            activation_func=torch.nn.functional.silu,
        )
        if "--context-parallel-size" not in sys.argv:
            without_flash_linear_attention()
    else:
        assert kind == "mla"
        script.get_gpt_layer_local_spec = mla_layer
        script.TransformerConfig = partial(
            MLATransformerConfig,
            multi_latent_attention=True,
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_head_dim=8,
            qk_pos_emb_head_dim=8,
            v_head_dim=12,
            rope_type="rope",
            apply_rope_fusion=False,
        )
    script.main()


if __name__ == "__main__":
    main()
