"""Contiguous token order in place of Megatron's zigzag, for methods that need it and users who ask for it.

Megatron cuts sequences in three places, and all three are replaced together: the batch, the rotary embeddings, and the
shift to the next token that multi-token prediction makes. Layers that undo the zigzag themselves are refused.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dsp_plugin.comm.collectives import ring_hop
from dsp_plugin.errors import PatchError, SequenceParallelConfigError, UnsupportedError
from dsp_plugin.layout import Layout
from dsp_plugin.methods import METHODS
from dsp_plugin.patches.megatron.state import NATIVE_LAYOUT, MegatronState
from dsp_plugin.patches.megatron.versions import DISTRIBUTION, SUPPORTED
from dsp_plugin.patches.patch import Patch

_CORE = "megatron.core"
_EMBEDDINGS = f"{_CORE}.models.common.embeddings"
_BATCH = "get_batch_on_this_cp_rank"
# What 0.19 puts behind the function that scripts import: replaced in its place, it does not matter who imported when.
_BATCH_INNER = "_get_batch_on_this_cp_rank_per_sequence_balancing"
_ROTARY = "get_pos_emb_on_this_cp_rank"
_ROLL = "roll_tensor"
# Entries of a batch that describe its documents and are no sequences.
_DOCUMENT_KEYS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")
_ZIGZAG_LAYERS = (
    ("ssm.mamba_mixer", "MambaMixer"),
    ("ssm.gated_delta_net", "GatedDeltaNet"),
    ("transformer.experimental_attention_variant.absorbed_mla", "AbsorbedMLASelfAttention"),
)


def patches(state: MegatronState) -> tuple[Patch, ...]:
    """None where tokens stay in Megatron's order."""
    if state.settings.layout_kind() == NATIVE_LAYOUT:
        return ()
    batch = _BATCH_INNER if hasattr(importlib.import_module(f"{_CORE}.utils"), _BATCH_INNER) else _BATCH
    cut, rotary, roll = ("batch", "cp_group"), ("pos_emb", "seq_dim", "cp_group"), ("tensor", "dims", "cp_group")
    found = [_patch(f"{_CORE}.utils", batch, functools.partial(_cut_batch, state), cut)]
    for module in ("rope_utils", "rotary_pos_embedding", "yarn_rotary_pos_embedding"):
        found.append(_patch(f"{_EMBEDDINGS}.{module}", _ROTARY, lambda _: _cut_rotary, rotary))
    for module in (f"{_CORE}.transformer.multi_token_prediction", f"{_CORE}.models.gpt.gpt_model"):
        if hasattr(importlib.import_module(module), _ROLL):
            found.append(_patch(module, _ROLL, functools.partial(_roll, state), roll))
    for module, layer in _ZIGZAG_LAYERS:
        if layer == "GatedDeltaNet" and METHODS[state.settings.method].kind == "linear":
            # It passes states then, see `gated_delta_net`.
            continue
        # Where one cannot be imported, such as Mamba without Triton, no model can have it.
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{_CORE}.{module}")
            refuse = functools.partial(_refuse_layer, layer)
            found.append(_patch(f"{_CORE}.{module}", f"{layer}.__init__", refuse, ("config",)))
    return tuple(found)


def refuse_early_importers(state: MegatronState) -> None:
    """To be called before `patches` are applied, which change what a module imports from then on.

    Raises:
        PatchError: a module already imported by name what the patches replace, and would go on cutting in zigzag order.
    """
    targets = [patch.target.partition(":")[::2] for patch in patches(state)]
    for home, name in targets:
        if "." in name:
            continue
        function = getattr(importlib.import_module(home), name)
        patched = {module for module, other in targets if other == name}
        early = [
            module
            for module, loaded in sys.modules.items()
            if module not in patched and getattr(loaded, "__dict__", {}).get(name) is function
        ]
        if early:
            raise PatchError(
                f"{', '.join(early)} imported {name} from {home} before the plugin could replace it, and would cut "
                f"sequences in {NATIVE_LAYOUT} order, not {state.settings.layout_kind()}. Start the script with "
                "`python -m dsp_plugin.launch`, or call dsp_plugin.patches.megatron.install before these imports."
            )


def _patch(module: str, name: str, make: Callable[[Any], object], parameters: tuple[str, ...]) -> Patch:
    return Patch(
        f"megatron contiguous order: {module}:{name}", f"{module}:{name}", DISTRIBUTION, SUPPORTED, make, parameters
    )


def _cut(x: Tensor, dim: int, size: int, rank: int) -> Tensor:
    return Layout("contiguous", x.shape[dim], size).shard(x, dim, rank).contiguous()


def _check_length(length: int, size: int) -> None:
    if length % size:
        raise SequenceParallelConfigError(
            setting="sequence length",
            value=length,
            why=f"Megatron's ranks hold equal parts, and {length} tokens / {size} context-parallel ranks leaves "
            f"{length % size}",
            remedy=f"make --seq-length a multiple of {size}",
        )


def _cut_batch(state: MegatronState, upstream: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(upstream)
    def get_batch_on_this_cp_rank(batch: dict[str, Any], cp_group: ProcessGroup | None = None) -> dict[str, Any]:
        if cp_group is None:
            assert state.groups is not None, "model parallelism is not initialized"
            size, rank = state.groups.sp.size, state.groups.sp.rank
        else:
            size, rank = cp_group.size(), cp_group.rank()
        for key, value in batch.items():
            if value is not None and key not in _DOCUMENT_KEYS:
                dim = 2 if key == "attention_mask" else 1
                _check_length(value.shape[dim], size)
                batch[key] = _cut(value, dim, size, rank)
        return batch

    return get_batch_on_this_cp_rank


def _cut_rotary(pos_emb: Tensor, seq_dim: int, cp_group: ProcessGroup) -> Tensor:
    return _cut(pos_emb, seq_dim, cp_group.size(), cp_group.rank())


def _roll(state: MegatronState, upstream: Callable[..., Any]) -> Callable[..., Any]:
    """The shift of multi-token prediction: the token after a rank's last is the next rank's first."""

    @functools.wraps(upstream)
    def roll_tensor(
        tensor: Tensor | None,
        shifts: int = -1,
        dims: int = -1,
        cp_group: ProcessGroup | None = None,
        packed_seq_params: Any = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        if tensor is None or packed_seq_params is not None or cp_group is None or cp_group.size() == 1:
            return upstream(tensor, shifts, dims, cp_group, packed_seq_params)
        assert shifts == -1, "multi-token prediction shifts by one token"
        assert state.groups is not None, "model parallelism was destroyed under a living model"
        axis = state.groups.sp
        after = ring_hop(tensor.narrow(dims, 0, 1).contiguous(), -1, axis=axis, method="mtp")
        if axis.rank == axis.size - 1:
            after = torch.zeros_like(after)
        rolled = torch.cat([tensor.narrow(dims, 1, tensor.shape[dims] - 1), after], dims)
        return rolled, rolled.sum()

    return roll_tensor


def _refuse_layer(layer: str, upstream: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(upstream)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if config.context_parallel_size > 1:
            raise UnsupportedError(
                setting="layer",
                value=layer,
                why=f"under context parallelism it takes its tokens in {NATIVE_LAYOUT} order, and the method or "
                "--sp-layout has them contiguous",
                remedy="choose a method that takes zigzag, such as ulysses or ring, with --sp-layout auto",
            )
        upstream(self, config, *args, **kwargs)

    return __init__
