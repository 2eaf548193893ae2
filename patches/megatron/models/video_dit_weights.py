"""The weights of `VideoDiT` in and out of `ParallelVideoDiT`, at any parallel sizes; both have the same names.

Two kinds of matrices differ in the order of their rows. `VideoDiT` has all queries, then all keys, then all values;
here every head has its own together, so that tensor parallelism cuts between heads. All but `draw` holds for other
models over `TokenStage` as well, whose plain models name those matrices alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

_STACKED = {"attn.qkv.weight": 3, "cross.kv.weight": 2}


def by_head(name: str, whole: Tensor, heads: int) -> Tensor:
    """A parameter of `VideoDiT`, whole, with its rows as `ParallelVideoDiT` has them."""
    for ending, parts in _STACKED.items():
        if name.endswith(ending):
            return rearrange(whole, "(part h d) c -> (h part d) c", part=parts, h=heads)
    return whole


def by_part(name: str, whole: Tensor, heads: int) -> Tensor:
    """The way back from `by_head`."""
    for ending, parts in _STACKED.items():
        if name.endswith(ending):
            return rearrange(whole, "(h part d) c -> (part h d) c", part=parts, h=heads)
    return whole


def draw(name: str, shape: Iterable[int], seed: int) -> Tensor:
    """A first value of a parameter of `VideoDiT`, from a generator of its own name: the same at any parallel sizes.

    Distributions are those of `dsp_plugin.models.video_dit.initialise`.

    Returns:
        fp32, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    value = torch.empty(tuple(shape))
    if "norm" in name:
        return value.fill_(1.0 if name.endswith("weight") else 0.0)
    if name.endswith("bias"):
        return value.normal_(0.0, 0.01, generator=generator)
    if name == "condition_embed.first" or (name == "condition_embed.embed.weight"):
        return value.normal_(0.0, 0.5, generator=generator)
    if "modulation" in name or name.startswith("final."):
        return value.normal_(0.0, 0.02, generator=generator)
    return nn.init.xavier_uniform_(value, generator=generator)


def load(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Copies this rank's part of the weights of a `VideoDiT` into a stage.

    Args:
        model: `ParallelVideoDiT`.
        weights: by name, whole; those of other stages are not looked at.

    Raises:
        KeyError: one is missing.
    """
    heads = model.config.num_attention_heads
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = by_head(name, weights[name], heads)
            if getattr(parameter, "tensor_model_parallel", False):
                whole = whole.chunk(model.tp_group.size(), parameter.partition_dim)[model.tp_group.rank()]
            parameter.copy_(whole)


class Drawn(Mapping[str, Tensor]):
    """The weights of a plain model as drawn one at a time, for `load`.

    Args:
        model: `ParallelVideoDiT`, or another, whose names and shapes are taken.
        seed: see `draw`.
        draw: makes a weight from its name, its shape and the seed.
    """

    def __init__(self, model: Any, seed: int, draw: Callable[[str, Iterable[int], int], Tensor] = draw) -> None:
        self._seed, self._draw = seed, draw
        self._shapes: dict[str, list[int]] = {}
        for name, parameter in model.named_parameters():
            shape = list(parameter.shape)
            if getattr(parameter, "tensor_model_parallel", False):
                shape[parameter.partition_dim] *= model.tp_group.size()
            self._shapes[name] = shape

    def __getitem__(self, name: str) -> Tensor:
        return self._draw(name, self._shapes[name], self._seed)

    def __iter__(self) -> Any:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def whole(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the shape of a stage's parameters, such as their gradients, as a `VideoDiT` has them.

    A collective of the tensor-parallel ranks.

    Args:
        model: `ParallelVideoDiT`.
        tensors: by name, one for every parameter of the stage.
    """
    found: dict[str, Tensor] = {}
    size = model.tp_group.size()
    for name, parameter in model.named_parameters():
        tensor = tensors[name]
        if getattr(parameter, "tensor_model_parallel", False) and size > 1:
            parts = [torch.empty_like(tensor) for _ in range(size)]
            dist.all_gather(parts, tensor.contiguous(), group=model.tp_group)
            tensor = torch.cat(parts, parameter.partition_dim)
        found[name] = by_part(name, tensor, model.config.num_attention_heads)
    return found


def whole_gradients(model: Any) -> dict[str, Tensor]:
    """The reduced gradients of a stage in Megatron's data-parallel wrapper; a collective like `whole`."""
    return whole(model, {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()})
