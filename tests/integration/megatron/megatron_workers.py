"""What the ranks of `dsp_plugin.spawn` do in the tests of groups and attention."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dsp_plugin.layout import Layout
from dsp_plugin.patches import cpu, megatron
from dsp_plugin.patches.patch import ALLOW_UNTESTED

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 2, 32, 4, 2, 8


@contextmanager
def initialized(method: str | None = "ulysses", **sizes: Any) -> Iterator[ModuleType]:
    """Megatron's groups with the plugin installed, both gone at the end."""
    cpu.install()
    from megatron.core import parallel_state, tensor_parallel

    if method is not None:
        megatron.install(method)
    parallel_state.initialize_model_parallel(**sizes)
    tensor_parallel.model_parallel_cuda_manual_seed(123)
    try:
        yield parallel_state
    finally:
        parallel_state.destroy_model_parallel()
        megatron.uninstall()


def message(call: Callable[[], object]) -> str:
    """The class and message of what `call` raises; empty if nothing."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def life_of_the_groups() -> dict[str, Any]:
    """Installs, initializes (TP2 x CP2), destroys, initializes again (CP4), uninstalls; what was seen on the way."""
    cpu.install()
    from megatron.core import parallel_state as upstream

    originals = (upstream.initialize_model_parallel, upstream.destroy_model_parallel)
    seen: dict[str, Any] = {"rank": dist.get_rank()}
    state = megatron.install("ulysses")
    seen["same state"] = megatron.install("ulysses") is megatron.install("ulysses", quiet=True) is state
    seen["other settings"] = message(lambda: megatron.install("ulysses", kernel="math"))
    seen["early"] = message(upstream.get_ulysses_parallel_group)

    with redirect_stdout(io.StringIO()) as printed:
        # Positional, as Megatron's own training loop calls it.
        upstream.initialize_model_parallel(2, 1, None, context_parallel_size=2)
    seen["said"] = printed.getvalue()
    seen["context"] = dist.get_process_group_ranks(upstream.get_context_parallel_group())
    for axis in ("ulysses", "ring", "dsp", "lasp"):
        group, size, rank = (
            getattr(upstream, f"get_{axis}_parallel_{what}")() for what in ("group", "world_size", "rank")
        )
        seen[axis] = (dist.get_process_group_ranks(group), size, rank)
    total = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(total, group=upstream.get_ulysses_parallel_group())
    seen["sum"] = total.item()
    upstream.destroy_model_parallel()
    seen["late"] = message(upstream.get_ulysses_parallel_group)

    upstream.initialize_model_parallel(context_parallel_size=4)
    seen["again"] = dist.get_process_group_ranks(upstream.get_ulysses_parallel_group())
    upstream.destroy_model_parallel()

    megatron.uninstall()
    megatron.uninstall()
    seen["restored"] = (upstream.initialize_model_parallel, upstream.destroy_model_parallel) == originals
    seen["left"] = [name for name in vars(upstream) if "ulysses" in name or "SEQUENCE_PARALLEL_STATE" in name]
    upstream.initialize_model_parallel(context_parallel_size=2)
    seen["after initialization"] = message(lambda: megatron.install("ulysses"))
    upstream.destroy_model_parallel()
    return seen


def grid_of(order: str) -> tuple[list[int], list[int], str]:
    """The Ulysses and the ring neighbours of this rank, itself included, on a grid of four; what a quiet run prints."""
    cpu.install()
    from megatron.core import parallel_state as upstream

    megatron.install("usp", ulysses_size=2, ulysses_order=order, quiet=True)
    with redirect_stdout(io.StringIO()) as printed:
        upstream.initialize_model_parallel(context_parallel_size=4)
    groups = upstream.get_ulysses_parallel_group(), upstream.get_ring_parallel_group()
    ulysses, ring = (dist.get_process_group_ranks(group) for group in groups)
    upstream.destroy_model_parallel()
    megatron.uninstall()
    return ulysses, ring, printed.getvalue()


def refused_initializations() -> dict[str, str]:
    """Sizes that do not fit, each with the error; no group must have been made by then."""
    cpu.install()
    from megatron.core import parallel_state as upstream

    found = {}
    cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "world": ({}, {"context_parallel_size": 3}),
        "world with tp": ({}, {"context_parallel_size": 2, "tensor_model_parallel_size": 4}),
        "factors": ({"ulysses_size": 4}, {"context_parallel_size": 2}),
        "hierarchy": ({}, {"context_parallel_size": 4, "hierarchical_context_parallel_sizes": [2, 2]}),
    }
    for name, (settings, sizes) in cases.items():
        megatron.install("ulysses", **settings)
        found[name] = message(lambda sizes=sizes: upstream.initialize_model_parallel(**sizes))
        found[name] += " (initialized)" if upstream.model_parallel_is_initialized() else ""
        megatron.uninstall()
    return found


def unsupported_version(version: str, allow: bool) -> dict[str, Any]:
    """Installs with another version of Megatron-core in the metadata; the error, and whether anything was patched."""
    cpu.install()
    from megatron.core import parallel_state as upstream

    before = dict(vars(upstream))
    metadata.version = lambda name: version  # type: ignore[assignment]
    if allow:
        os.environ[ALLOW_UNTESTED] = "1"
    found = message(lambda: megatron.install("ulysses"))
    return {"message": found, "patched": dict(vars(upstream)) != before}


def config(**settings: Any) -> Any:
    """A transformer configuration for one attention layer over the two ranks."""
    from megatron.core.transformer import TransformerConfig

    shape = {
        "num_layers": 2,
        "hidden_size": HEADS * HEAD_DIM,
        "num_attention_heads": HEADS,
        "num_query_groups": KV_HEADS,
        "context_parallel_size": dist.get_world_size(),
        "attention_dropout": 0.0,
        "masked_softmax_fusion": False,
    }
    return TransformerConfig(**{**shape, **settings})


def layer(settings: dict[str, Any] | None = None, core: Any = None) -> Any:
    """A self-attention layer of the local spec."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.enums import AttnMaskType

    submodules = get_gpt_layer_local_spec().submodules.self_attention.submodules
    if core is not None:
        submodules = replace(submodules, core_attention=core)
    return SelfAttention(config(**(settings or {})), submodules, 1, attn_mask_type=AttnMaskType.causal)


def masks() -> dict[str, tuple[dict[str, Any], str, Tensor | None]]:
    """By name: configuration, mask type, and the dense mask over the whole sequence that goes with it."""
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]
    # Of 5, 1, 17 and the rest, and one whose border rank 0 alone sees in zigzag order.
    documents, late = future.clone(), future.clone()
    for border in (5, 6, 23):
        documents[..., border:, :border] = True
    late[..., 24:, :24] = True
    return {
        "documents": ({}, "causal", documents),
        "documents, a mask for each sample": ({}, "causal", documents.expand(BATCH, 1, -1, -1).contiguous()),
        "documents, one rank sees the border": ({}, "causal", late),
        "causal": ({}, "causal", None),
        "causal, its mask given": ({}, "causal", future),
        "causal, a mask for each sample": ({}, "causal", future.expand(BATCH, 1, -1, -1).contiguous()),
        "full": ({}, "no_mask", None),
        "padding, nothing padded": ({}, "padding", torch.zeros_like(future)),
        "window": ({"window_size": (7, 0)}, "causal", None),
        "window on both sides": ({"window_size": (5, 3)}, "no_mask", None),
        "window, layer skipped": ({"window_size": (7, 0), "window_attn_skip_freq": [0, 1]}, "causal", None),
        "scaled by the layer number": ({"apply_query_key_layer_scaling": True}, "causal", None),
        "own scale": ({"softmax_scale": 0.7}, "causal", None),
    }


def attention_errors() -> dict[str, float]:
    """For each mask, the largest relative error of output and gradients against upstream's dense attention."""
    from_upstream = {}
    with initialized(context_parallel_size=dist.get_world_size()):
        from megatron.core.transformer.dot_product_attention import DotProductAttention
        from megatron.core.transformer.enums import AttnMaskType

        for name, (settings, kind, mask) in masks().items():
            kwargs = {
                "layer_number": 1,
                "attn_mask_type": AttnMaskType[kind],
                "attention_type": "self",
                "softmax_scale": settings.get("softmax_scale"),
            }
            whole = DotProductAttention(config(**settings, context_parallel_size=1), **kwargs)
            ours = type(layer(settings).core_attention)(config(**settings), **kwargs)
            from_upstream[name] = _largest_error(whole, ours, AttnMaskType[kind], mask)
    return from_upstream


def _largest_error(whole: torch.nn.Module, ours: torch.nn.Module, kind: Any, mask: Tensor | None) -> float:
    layout, rank = Layout("zigzag", LENGTH, dist.get_world_size()), dist.get_rank()
    generator = torch.Generator().manual_seed(5)
    shapes = [(LENGTH, BATCH, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    qkv = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    dout = torch.randn(LENGTH, BATCH, HEADS * HEAD_DIM, generator=generator)
    out = whole(*qkv, mask, attn_mask_type=kind)
    out.backward(dout)
    local = [layout.shard(x.detach(), 0, rank).clone().requires_grad_() for x in qkv]
    local_mask = None if mask is None else layout.shard(mask, 2, rank)
    local_out = ours(*local, local_mask, attn_mask_type=kind)
    local_out.backward(layout.shard(dout, 0, rank))
    pairs = [(local_out, out), *((x.grad, y.grad) for x, y in zip(local, qkv, strict=True))]
    return max(((x - layout.shard(y, 0, rank)).norm() / y.norm()).item() for x, y in pairs)


def refused_layers() -> dict[str, str]:
    """What a layer must not silently get wrong, each with the error on this rank."""
    found = {}
    with initialized(context_parallel_size=dist.get_world_size()) as parallel_state:
        from megatron.core.transformer.enums import AttnMaskType

        class SparseAttention(torch.nn.Module):
            """Some other attention."""

        for name, build in {
            "softmax type": lambda: layer({"softmax_type": "off-by-one"}),
            "max logit": lambda: layer({"log_max_attention_logit": True}),
            "attention in fp8": lambda: layer({"fp8": "hybrid", "fp8_dot_product_attention": True}),
            "heads in fp8": lambda: layer({"fp8": "hybrid", "fp8_multi_head_attention": True}),
            "other attention": lambda: layer(core=SparseAttention),
            "too few heads": lambda: layer({"num_attention_heads": 1, "num_query_groups": 1}),
            "another size": lambda: layer({"context_parallel_size": 4}),
            "another group": lambda: _on_other_groups(parallel_state),
        }.items():
            found[name] = message(build)

        core = layer().core_attention
        n = LENGTH // dist.get_world_size()
        q, k = torch.randn(n, BATCH, HEADS, HEAD_DIM), torch.randn(n, BATCH, KV_HEADS, HEAD_DIM)
        cached = torch.randn(2 * n, BATCH, KV_HEADS, HEAD_DIM)
        # Two documents of 24 and 8 tokens: in zigzag order only rank 0 has rows that the border changes.
        documents = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        documents[24:, :24] = True
        mine = Layout("zigzag", LENGTH, dist.get_world_size()).shard(documents[None, None], 2, dist.get_rank())
        causal = Layout("zigzag", LENGTH, dist.get_world_size()).shard(
            torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None], 2, dist.get_rank()
        )
        found["rows changed"] = str(bool((mine != causal).any()))
        unlike = torch.cat([mine, causal.expand(BATCH - 1, -1, -1, -1)])
        holes = causal.clone()
        # A token that the next one does not see, on the first rank.
        holes[0, 0, 1, 0] |= dist.get_rank() == 0
        holes[0, 0, 2, 1] |= dist.get_rank() == 0
        for name, call in {
            "other documents in each sample": lambda: core(q, k, k, unlike, attn_mask_type=AttnMaskType.causal),
            "holes": lambda: core(q, k, k, holes, attn_mask_type=AttnMaskType.causal),
            "documents without causality": lambda: core(q, k, k, mine, attn_mask_type=AttnMaskType.no_mask),
            "mask of another shape": lambda: core(q, k, k, mine[..., :-1], attn_mask_type=AttnMaskType.causal),
            "arbitrary mask": lambda: core(q, k, k, None, attn_mask_type=AttnMaskType.arbitrary),
            "bias": lambda: core(q, k, k, None, attention_bias=torch.zeros(1)),
            "packed": lambda: core(q, k, k, None, packed_seq_params=SimpleNamespace(qkv_format="thd")),
            "cache": lambda: core(q, cached, cached, None),
        }.items():
            found[name] = message(call)
        found["still works"] = message(lambda: core(q, k, k, None))
    return found


def _on_other_groups(parallel_state: ModuleType) -> object:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.enums import AttnMaskType

    groups = SimpleNamespace(
        tp=parallel_state.get_tensor_model_parallel_group(), cp=parallel_state.get_tensor_model_parallel_group()
    )
    submodules = get_gpt_layer_local_spec().submodules.self_attention.submodules
    return SelfAttention(config(), submodules, 1, attn_mask_type=AttnMaskType.causal, pg_collection=groups)


def built_attention() -> dict[str, str]:
    """The class of core attention in layers where the plugin has something to do, and where it has not."""
    from_cross = {}
    with initialized(context_parallel_size=dist.get_world_size()):
        from_cross["self"] = type(layer().core_attention).__name__
        from_cross["context parallel size 1"] = type(layer({"context_parallel_size": 1}).core_attention).__name__
        from_cross["mla"] = message(_mla) or "SequenceParallelAttention"
        from_cross["cross"] = message(_cross)
    with initialized(method=None, context_parallel_size=dist.get_world_size()):
        from_cross["without the plugin"] = message(layer)
    return from_cross


def _cross() -> object:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType

    core = get_gpt_layer_local_spec().submodules.self_attention.submodules.core_attention
    submodules = CrossAttentionSubmodules(ColumnParallelLinear, ColumnParallelLinear, core, RowParallelLinear)
    return CrossAttention(config(num_query_groups=HEADS), submodules, 1, attn_mask_type=AttnMaskType.no_mask)


def _mla() -> None:
    """Multi-latent attention, whose values are narrower than its keys, against PyTorch's attention in fp64."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import MLATransformerConfig
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    shape = MLATransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=HEADS,
        multi_latent_attention=True,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_head_dim=8,
        qk_pos_emb_head_dim=8,
        v_head_dim=12,
        rope_type="rope",
        apply_rope_fusion=False,
        context_parallel_size=dist.get_world_size(),
        attention_dropout=0.0,
    )
    submodules = get_gpt_layer_local_spec(multi_latent_attention=True).submodules.self_attention.submodules
    attention = MLASelfAttention(shape, submodules, 1, attn_mask_type=AttnMaskType.causal)
    core = attention.core_attention
    assert type(core).__name__ == "SequenceParallelAttention"
    assert core.scale == attention.softmax_scale
    layout, rank = Layout("zigzag", LENGTH, dist.get_world_size()), dist.get_rank()
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(LENGTH, BATCH, HEADS, dim, generator=generator, dtype=torch.float64) for dim in (16, 16, 12))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (q, k, v)), is_causal=True, scale=core.scale
    )
    out = core(*(layout.shard(x, 0, rank).float() for x in (q, k, v)), None)
    torch.testing.assert_close(
        out.double(), layout.shard(expected.permute(2, 0, 1, 3).flatten(2), 0, rank), rtol=1e-5, atol=1e-5
    )
