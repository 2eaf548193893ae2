"""What the ranks of `dsp_plugin.spawn` do in the tests of linear attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron_workers import config, initialized, message

from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.layout import Layout
from dsp_plugin.patches import cpu, megatron

BATCH, LENGTH, HIDDEN = 2, 24, 32
SIZES = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
}


def layer(decay: str = "gated-delta", *, convolution: bool = True, **settings: Any) -> Any:
    """A linear-attention layer on the local backend, over two ranks unless the settings say else."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from dsp_plugin.patches.megatron.models.linear_attention import LinearAttention, LinearAttentionSubmodules

    parts = LinearAttentionSubmodules(ColumnParallelLinear, RowParallelLinear)
    return LinearAttention(config(**{**SIZES, **settings}), parts, 2, decay=decay, convolution=convolution)


def layer_errors() -> dict[str, float]:
    """By decay and layout, the largest relative error of the output and of the gradients of inputs and parameters."""
    cpu.install()
    found = {}
    for order in ("contiguous", "zigzag"):
        megatron.install("lasp", layout=order, softmax_method="ring")
        with initialized(None, context_parallel_size=dist.get_world_size()):
            for decay in DECAYS:
                found[f"{decay}, {order}"] = _layer_error(order, decay)
            bare = _layer_error(order, "gated-delta", convolution=False)
            found[f"gated-delta without convolution, {order}"] = bare
    return found


def _layer_error(order: Any, decay: str, **settings: Any) -> float:
    whole = layer(decay, context_parallel_size=1, **settings)
    sharded = layer(decay, **settings)
    sharded.load_state_dict(whole.state_dict())
    layout, rank = Layout(order, LENGTH, dist.get_world_size()), dist.get_rank()
    generator = torch.Generator().manual_seed(7)
    hidden, dout = torch.randn(2, LENGTH, BATCH, HIDDEN, generator=generator)
    local = layout.shard(hidden, 0, rank).clone().requires_grad_()
    hidden.requires_grad_()
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    out, local_out = whole(hidden, future)[0], sharded(local, layout.shard(future, 2, rank))[0]
    out.backward(dout)
    local_out.backward(layout.shard(dout, 0, rank))
    assert hidden.grad is not None
    pairs = [(local_out, layout.shard(out, 0, rank)), (local.grad, layout.shard(hidden.grad, 0, rank))]
    for mine, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
        dist.all_reduce(mine.grad)
        pairs.append((mine.grad, theirs.grad))
    return max(((x - y).norm() / y.norm()).item() for x, y in pairs)


def refused() -> dict[str, str]:
    """What a linear layer must not silently get wrong, each with the error on this rank."""
    size = dist.get_world_size()
    found = {}
    with initialized(None, context_parallel_size=size):
        found["no plugin"] = message(layer)
    with initialized("ulysses", context_parallel_size=size):
        found["another method"] = message(layer)
    with initialized("lasp", context_parallel_size=size):
        found["unknown decay"] = message(lambda: layer("exponential"))
        found["heads"] = message(lambda: layer(linear_num_key_heads=3))
        found["another size"] = message(lambda: layer(context_parallel_size=4))
        found["frequency"] = message(lambda: _layers(linear_attention_freq=0))
        found["layers"] = ", ".join(
            f"{name}: {_layers(linear_attention_freq=every, num_layers=4)}"
            for name, every in {"every third": 3, "list": [0, 1, 1, 0], "none": None}.items()
        )
        linear = layer()
        layout, rank = Layout("contiguous", LENGTH, size), dist.get_rank()
        hidden = torch.randn(LENGTH // size, BATCH, HIDDEN)
        future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
        two, late = future.clone(), future.clone()
        two[..., 8:, :8] = True
        # A border that rank 0 does not see.
        late[..., 20:, :20] = True
        packed = SimpleNamespace(qkv_format="thd")
        for name, call in {
            "packed": lambda: linear(hidden, None, packed_seq_params=packed),
            "cache": lambda: linear(hidden, None, inference_context=SimpleNamespace()),
            "documents": lambda: linear(hidden, layout.shard(two, 2, rank)),
            "documents on one rank": lambda: linear(hidden, layout.shard(late, 2, rank)),
            "packed gated delta net": lambda: _gated_delta_net()(hidden, None, packed_seq_params=packed),
        }.items():
            found[name] = message(call)
        found["still works"] = message(lambda: linear(hidden, layout.shard(future, 2, rank)))
    return found


def _layers(**settings: Any) -> str:
    """L or S for each layer of a hybrid."""
    from dsp_plugin.patches.megatron.linear_specs import hybrid_layer_specs
    from dsp_plugin.patches.megatron.models.linear_attention import LinearAttention

    block = hybrid_layer_specs(config(**SIZES, **settings), use_transformer_engine=False)
    modules = [spec.submodules.self_attention.module for spec in block.layer_specs]
    return "".join("L" if module is LinearAttention else "S" for module in modules)


def _gated_delta_net() -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules

    parts = get_gpt_layer_local_spec().submodules
    linear = parts.self_attention.submodules
    submodules = GatedDeltaNetSubmodules(linear.linear_qkv, parts.input_layernorm, linear.linear_proj)
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    return GatedDeltaNet(config(**SIZES), submodules, 1, pg_collection=groups)
