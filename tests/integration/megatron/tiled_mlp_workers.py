"""What the ranks of `dsp_plugin.spawn` do in the tests of Megatron's tiled MLP."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from megatron_workers import message
from tiled_head_workers import BATCH, HIDDEN, LENGTH, Largest, largest_error, settings, world
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FFN, TILES = 96, 5
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu},
    "without bias": {"add_bias_linear": False},
    "fused": {"bias_activation_fusion": True},
}


def mlp(**of: Any) -> Any:
    """One of two layers, alike on every rank but for its part."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    config = TransformerConfig(**settings(ffn_hidden_size=FFN, **of))
    warnings.simplefilter("ignore")
    made = MLP(
        config, MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear), ffn_hidden_size=FFN
    )
    made.to(config.params_dtype)
    generator = torch.Generator().manual_seed(dist.get_rank())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            # The second layer's bias is whole on every rank.
            alike = torch.Generator().manual_seed(9) if name == "linear_fc2.bias" else generator
            parameter.copy_(torch.randn(parameter.shape, generator=alike, dtype=torch.float64))
    return made


class Collectives(TorchDispatchMode):
    """Counts collectives and the elements that they get, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            elements = sum(leaf.numel() for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
            self.seen[str(function), elements] += 1
        return function(*args, **(kwargs or {}))


def step(made: Any, checkpointed: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of this rank's tokens, and the gradients of input and parameters."""
    from megatron.core import tensor_parallel

    made.zero_grad()
    ranks = made.tp_group.size() if made.linear_fc1.sequence_parallel else 1
    generator = torch.Generator().manual_seed(1 if ranks == 1 else dist.get_rank())
    x, grad = torch.randn(2, LENGTH // ranks, BATCH, HIDDEN, generator=generator, dtype=torch.float64)
    x.requires_grad_()

    def whole(x: Tensor) -> Tensor:
        out, bias = made(x)
        return out if bias is None else out + bias

    out = tensor_parallel.checkpoint(whole, False, x) if checkpointed else whole(x)
    out.backward(grad)
    assert x.grad is not None
    return out.detach(), {"x": x.grad, **{name: p.grad.clone() for name, p in made.named_parameters()}}


def beside_whole(sequence_parallel: bool) -> dict[str, Any]:
    """Tiled and whole MLPs of every kind: the largest error, the largest tensors, and whether both send the same."""
    found: dict[str, Any] = {}
    for kind, of in KINDS.items():
        seen = {}
        for name, memory in {"tiled": {"mlp_tiles": TILES}, "whole": None}.items():
            with world(memory, tensor_model_parallel_size=dist.get_world_size()):
                made = mlp(sequence_parallel=sequence_parallel, **of)
                with Largest() as largest, Collectives() as collectives:
                    result = step(made)
                again = step(made, checkpointed=True)
                seen[name] = (result, again, largest.elements, collectives.seen)
        whole = seen["whole"]
        found[kind] = {
            "error": max(largest_error(result, whole[0]) for result in seen["tiled"][:2]),
            "largest": (seen["tiled"][2], whole[2]),
            "sends the same": seen["tiled"][3] == whole[3],
            "sends": sum(whole[3].values()),
        }
    found["between"] = LENGTH * BATCH * FFN // dist.get_world_size()
    return found


def refused() -> dict[str, str]:
    """Layers that are not known, each with the error on this rank; and experts, which are left as they are."""
    found = {}
    with world({"mlp_tiles": TILES}, tensor_model_parallel_size=dist.get_world_size()):
        from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
        from megatron.core.transformer import TransformerConfig
        from megatron.core.transformer.mlp import MLP, MLPSubmodules

        class TELayerNormColumnParallelLinear(ColumnParallelLinear):
            """By its name Transformer Engine's, which is not installed here."""

        class Own(MLP):
            """A user's."""

        config = TransformerConfig(**settings(ffn_hidden_size=FFN))
        parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        others = MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=RowParallelLinear)
        found["layer"] = message(lambda: MLP(config, others, ffn_hidden_size=FFN))
        found["class"] = message(lambda: Own(config, parts, ffn_hidden_size=FFN))
        expert = MLP(config, parts, is_expert=True, ffn_hidden_size=FFN)
        expert.to(torch.float64)
        with Largest() as largest:
            step(expert)
        found["expert's largest"] = str(largest.elements)
    with world("auto", tensor_model_parallel_size=dist.get_world_size()):
        found["auto"] = message(lambda: step(MLP(config, others, ffn_hidden_size=FFN).to(torch.float64)))
    return found
