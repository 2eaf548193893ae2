"""Megatron's `MLP` some tokens at a time: what it keeps of a token between its two layers exists for one tile.

The collectives of tensor parallelism are those of the two layers: the all-gather of ``--sequence-parallel`` comes
before the tiles and the reduce-scatter after them, and what is kept for the backward pass is this rank's part, which is
gathered there again, as Megatron does. Without it the sum over ranks comes after the tiles, and backward before them.
Experts are left whole, shared ones too: routing has made them small. ``"auto"`` leaves what is not known whole as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches.megatron.state import MegatronState, Memory
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch
from dsp_plugin.tiles.mlp import AUTO_MLP_BYTES, bytes_of_token, tile_count, tiled

_MLP = "megatron.core.transformer.mlp:MLP"


def patches(state: MegatronState) -> tuple[Patch, ...]:
    """Wraps the class's constructor and forward pass; none where MLPs are not to be tiled."""
    memory = state.settings.memory_parts()
    if memory != "auto" and memory.mlp_tiles == 1:
        return ()
    tiling = functools.partial(_tiling, memory)
    taken = ("self", "hidden_states", "per_token_scale")
    found: list[Patch] = [Patch("megatron tiled MLP", f"{_MLP}.forward", DISTRIBUTION, SUPPORTED, tiling, taken)]
    if memory != "auto":
        name = "megatron tiled MLP: its layers"
        found.append(Patch(name, f"{_MLP}.__init__", DISTRIBUTION, SUPPORTED, _refusing, ("self",)))
    return tuple(found)


def _of_experts(mlp: Any) -> bool:
    """Whether it is one of a mixture of experts."""
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    return isinstance(mlp, SharedExpertMLP) or getattr(mlp.linear_fc1, "is_expert", False)


def _unknown(mlp: Any) -> tuple[str, type, type] | None:
    """What of it is not Megatron's own: its name, its class, and the class that is; None where all of it is."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP

    for name, part, known in (
        ("MLP", mlp, MLP),
        ("linear_fc1", mlp.linear_fc1, ColumnParallelLinear),
        ("linear_fc2", mlp.linear_fc2, RowParallelLinear),
    ):
        if type(part) is not known or getattr(part, "gtp_remat_size", 1) > 1:
            return name, type(part), known
    return None


def _refusing(upstream: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(upstream)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        upstream(self, *args, **kwargs)
        unknown = None if _of_experts(self) else _unknown(self)
        if unknown is not None:
            name, kind, known = unknown
            raise UnsupportedError(
                setting="memory.mlp_tiles",
                why=f"{name} is a {kind.__name__} with collectives, and perhaps a norm, of its own; tiles go between "
                f"the collectives of Megatron's {known.__name__}",
                remedy="build the model's layers from the local spec (--transformer-impl local), or leave mlp_tiles "
                "out of the section that --sp-memory is given",
            )

    return __init__


def _tiling(memory: Memory, upstream: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(upstream)
    def forward(self: Any, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any) -> Any:
        if per_token_scale is not None or _of_experts(self) or _unknown(self):
            return upstream(self, hidden_states, per_token_scale, **kwargs)
        first, second = self.linear_fc1, self.linear_fc2
        tokens = hidden_states.shape[:-1].numel() * (first.tp_group.size() if first.sequence_parallel else 1)
        tiles = _tiles(self, memory, tokens, hidden_states.element_size())
        if -(-tokens // tiles) >= tokens:
            return upstream(self, hidden_states, **kwargs)

        def compute(rows: Tensor) -> Tensor:
            with _without_collectives(first, second):
                return upstream(self, rows.unsqueeze(1), **kwargs)[0].squeeze(1)

        in_tiles = functools.partial(tiled, compute, holder=self, tiles=tiles)
        out = _between_collectives(first, second, hidden_states, in_tiles)
        if second.skip_bias_add:
            return out, second.bias
        return out if second.bias is None else out + second.bias, None

    return forward


def _tiles(mlp: Any, memory: Memory, tokens: int, element_size: int) -> int:
    if memory != "auto":
        return memory.mlp_tiles
    between, after = mlp.linear_fc1.output_size_per_partition, mlp.linear_fc2.output_size
    return tile_count(tokens, bytes_of_token([between, after], element_size), AUTO_MLP_BYTES)


def _between_collectives(first: Any, second: Any, mine: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """What comes in from the tensor-parallel ranks, ``compute`` of it, and the sum of that over the ranks."""
    from megatron.core.tensor_parallel import (
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        reduce_from_tensor_model_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    if not first.sequence_parallel:
        rows = copy_to_tensor_model_parallel_region(mine, group=first.tp_group)
        return reduce_from_tensor_model_parallel_region(compute(rows), group=second.tp_group)

    def part(gathered: Tensor) -> Tensor:
        assert gathered.shape[0] == mine.shape[0] * first.tp_group.size(), "tiles keep their input and nothing else"
        return mine.detach()

    @torch.no_grad()
    def gathered_again(part: Tensor) -> Tensor:
        return gather_from_sequence_parallel_region(part, group=first.tp_group)

    rows = gather_from_sequence_parallel_region(mine, group=first.tp_group)
    with saved_tensors_hooks(part, gathered_again):
        out = compute(rows)
    return reduce_scatter_to_sequence_parallel_region(out, group=second.tp_group)


@contextmanager
def _without_collectives(*layers: Any) -> Iterator[None]:
    """The layers multiply, and their gradients are ordinary ones: no kernel adds a tile's to `main_grad` on its own."""
    for layer in layers:
        layer.forward = functools.partial(_multiplied, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _multiplied(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    added, beside = (None, layer.bias) if layer.skip_bias_add else (layer.bias, None)
    return torch.nn.functional.linear(x, layer.weight, added), beside
