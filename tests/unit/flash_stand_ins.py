"""What stands in for the CUDA flash kernels on CPU: the upstream signatures, and in fp64 what FlashAttention documents.

They insist on what the real kernels silently assume: equal head dims that are a multiple of 8, dense last dims, a
contiguous lse, borders in int32 that cover all tokens, and the longest segments as told.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from recorded_signatures import FLASH_ATTENTION_2, FLASH_ATTENTION_3, Recorded
from test_kernels_blocks import flash_attention_2_sees, flash_attention_3_sees
from torch import Tensor

from dsp_plugin.kernels import flash_attention, table
from dsp_plugin.kernels.windowed import Window

# Which keys of a segment a query sees, by window, rows, columns, and the rows and columns of the longest segment.
Rule = Callable[[Window, int, int, tuple[int, int]], Tensor]

STAND_INS: dict[str, Recorded | None] = {
    "fa2": FLASH_ATTENTION_2[0],
    "fa2-late": FLASH_ATTENTION_2[-1],
    "fa3-early": FLASH_ATTENTION_3[0],
    "fa3-late": FLASH_ATTENTION_3[-1],
    "cuda_flash": None,
}


def _scores(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scores ``[1, H, n, m]`` and values, both fp64."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.double().repeat_interleave(group, 2) for x in (k, v))
    return (torch.einsum("bihd,bjhd->bhij", q.double(), keys) * scale).masked_fill(~seen, -torch.inf), values


def _segments(
    rule: Rule, window: Window, arguments: dict[str, Any]
) -> Iterator[tuple[slice | int, slice, slice, Tensor]]:
    """Of every segment, or batch row, where its queries and keys lie, and which keys they see."""
    q, k = arguments["q"], arguments["k"]
    if arguments.get("cu_seqlens_q") is None:
        assert q.dim() == k.dim() == 4
        rows, cols = q.shape[1], k.shape[1]
        seen = rule(window, rows, cols, (rows, cols))
        for row in range(q.shape[0]):
            yield row, slice(0, rows), slice(0, cols), seen
        return
    assert q.dim() == k.dim() == 3
    q_borders, k_borders = (arguments[f"cu_seqlens_{name}"] for name in "qk")
    most = arguments["max_seqlen_q"], arguments["max_seqlen_k"]
    for borders, x, longest in ((q_borders, q, most[0]), (k_borders, k, most[1])):
        assert borders.dtype == torch.int32
        assert borders.is_contiguous()
        assert (borders[0], borders[-1]) == (0, len(x))
        assert borders.diff().min() > 0
        assert borders.diff().max() == longest
    for (q0, q1), (k0, k1) in zip(pairwise(q_borders.tolist()), pairwise(k_borders.tolist()), strict=True):
        yield 0, slice(q0, q1), slice(k0, k1), rule(window, q1 - q0, k1 - k0, most)


def _checked(arguments: dict[str, Any], *names: str) -> None:
    tensors = [arguments[name] for name in names]
    assert len({x.shape[-1] for x in tensors}) == 1
    assert tensors[0].shape[-1] % 8 == 0
    assert all(x.stride(-1) == 1 for x in tensors)


def forward(rule: Rule, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """``(out, lse)``; lse is ``[B, H, n]``, of segments ``[H, total]``."""
    _checked(arguments, "q", "k", "v")
    window = Window(arguments["window_size_left"], arguments["window_size_right"])
    assert arguments["causal"] == window.causal
    q, k, v = (x if x.dim() == 4 else x[None] for x in (arguments[name] for name in "qkv"))
    out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
    for row, rows, cols, seen in _segments(rule, window, arguments):
        scores, values = _scores(
            q[row : row + 1, rows], *(x[row : row + 1, cols] for x in (k, v)), seen, arguments["scale"]
        )
        found = scores.logsumexp(-1)
        lse[row, :, rows] = found[0].float()
        out[row, rows] = torch.einsum("bhij,bjhd->bihd", (scores - found[..., None]).exp(), values)[0].to(q.dtype)
    return (out, lse) if arguments["q"].dim() == 4 else (out[0], lse[0])


def backward(rule: Rule, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)``."""
    _checked(arguments, "dout", "q", "k", "v", "out")
    lse, window = arguments["lse"], Window(arguments["window_size_left"], arguments["window_size_right"])
    assert lse.is_contiguous()
    assert lse.dtype == torch.float32
    whole = arguments["q"].dim() == 4
    lse = lse if whole else lse[None]
    q, k, v, dout, out = (x if whole else x[None] for x in (arguments[name] for name in ("q", "k", "v", "dout", "out")))
    grads = tuple(torch.full_like(x, torch.nan) for x in (q, k, v))
    for row, rows, cols, seen in _segments(rule, window, arguments):
        at = slice(row, row + 1)
        scores, values = _scores(q[at, rows], k[at, cols], v[at, cols], seen, arguments["scale"])
        group, wide = q.shape[2] // k.shape[2], dout[at, rows].double()
        keys = k[at, cols].double().repeat_interleave(group, 2)
        # At the given lse and out, as the flash backward does, rather than at this block's own.
        probabilities = (scores - lse[at, :, rows].double()[..., None]).exp()
        delta = torch.einsum("bihd,bihd->bhi", wide, out[at, rows].double())
        of_scores = probabilities * (torch.einsum("bihd,bjhd->bhij", wide, values) - delta[..., None])
        of_scores *= arguments["scale"]
        of_queries = torch.einsum("bhij,bjhd->bihd", of_scores, keys)
        of_keys = torch.einsum("bhij,bihd->bjhd", of_scores, q[at, rows].double())
        of_values = torch.einsum("bhij,bihd->bjhd", probabilities, wide)
        summed = (x.unflatten(2, (-1, group)).sum(3) for x in (of_keys, of_values))
        for grad, run, value in zip(grads, (rows, cols, cols), (of_queries, *summed), strict=True):
            grad[at, run] = value.to(grad.dtype)
    dq, dk, dv = (x if whole else x[0] for x in grads)
    return dq, dk, dv


def fake_flash_attn_2(recorded: Recorded) -> ModuleType:
    """The module that a release of ``flash_attn`` has."""
    module = ModuleType("flash_attn.flash_attn_interface")

    def bound(name: str, arguments: tuple, keywords: dict) -> dict[str, Any]:
        found = recorded.python(name).bind(*arguments, **keywords)
        found.apply_defaults()
        a = found.arguments
        assert (a["dropout_p"], a["softcap"], a["alibi_slopes"]) == (0.0, 0.0, None)
        return {**a, "scale": a["softmax_scale"], "lse": a.get("softmax_lse")}

    def of(name: str) -> Callable[..., Any]:
        def run_forward(*arguments, **keywords):
            out, lse = forward(flash_attention_2_sees, bound(name, arguments, keywords))
            return out, lse, torch.empty(0), torch.empty(2)

        def run_backward(*arguments, **keywords):
            a = bound(name, arguments, keywords)
            for grad, value in zip((a["dq"], a["dk"], a["dv"]), backward(flash_attention_2_sees, a), strict=True):
                grad.copy_(value)
            return torch.empty(0)

        return run_forward if name.endswith("forward") else run_backward

    for name in recorded.signatures:
        setattr(module, name, of(name))
    return module


def _by_schema(schema: Any, arguments: tuple, keywords: dict) -> dict[str, Any]:
    # The dispatcher leaves out arguments that equal their default.
    given = dict(zip((argument.name for argument in schema.arguments), arguments, strict=False)) | keywords
    return {argument.name: argument.default_value for argument in schema.arguments} | given


def register_fake_flash_attn_3(library: torch.library.Library, recorded: Recorded) -> None:
    """The operators that a build of ``flash_attn_3`` registers."""
    schemas = {name: torch._C.parse_schema(f"flash_attn_3::{text}") for name, text in recorded.signatures.items()}

    def bound(name: str, arguments: tuple, keywords: dict) -> dict[str, Any]:
        a = _by_schema(schemas[name], arguments, keywords)
        return {**a, "scale": a["softmax_scale"], "causal": a["is_causal"], "lse": a.get("softmax_lse")}

    def fwd(*arguments, **keywords):
        out, lse = forward(flash_attention_3_sees, bound("fwd", arguments, keywords))
        return out, lse, torch.empty(0), torch.empty(0)

    def bwd(*arguments, **keywords):
        a = bound("bwd", arguments, keywords)
        grads = a["dq"], a["dk"], a["dv"]
        for grad, value in zip(grads, backward(flash_attention_3_sees, a), strict=True):
            grad.copy_(value)
        unused = [torch.empty(0) for _ in schemas["bwd"].returns]
        return (*grads, *unused[3:]) if schemas["bwd"].returns[0].alias_info else tuple(unused)

    for name, implementation in (("fwd", fwd), ("bwd", bwd)):
        library.define(recorded.signatures[name])
        library.impl(name, implementation, "CPU")


def register_fake_aten(library: torch.library.Library) -> None:
    """torch's own operators, which have no implementation for CPU."""
    names = {"query": "q", "key": "k", "value": "v", "grad_out": "dout", "logsumexp": "lse", "is_causal": "causal"}
    names |= {
        "cum_seq_q": "cu_seqlens_q",
        "cum_seq_k": "cu_seqlens_k",
        "max_q": "max_seqlen_q",
        "max_k": "max_seqlen_k",
    }

    def bound(op: Any, arguments: tuple, keywords: dict) -> dict[str, Any]:
        a = _by_schema(op.default._schema, arguments, keywords)
        assert a["dropout_p"] == 0.0
        return {names.get(name, name): value for name, value in a.items()}

    def run_forward(*arguments, **keywords):
        out, lse = forward(flash_attention_2_sees, bound(torch.ops.aten._flash_attention_forward, arguments, keywords))
        return out, lse, torch.empty(2), torch.empty(()), torch.empty(0)

    def run_backward(*arguments, **keywords):
        return backward(flash_attention_2_sees, bound(torch.ops.aten._flash_attention_backward, arguments, keywords))

    library.impl("_flash_attention_forward", run_forward, "CPU")
    library.impl("_flash_attention_backward", run_backward, "CPU")


@contextmanager
def standing_in(name: str, recorded: Recorded | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a kernel of the table that now believes in its package and runs on CPU tensors."""
    name = name.split("-")[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(type(table.KERNELS[name]), "supports", lambda *_: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.8.3")
    forget_packages()
    with ExitStack() as stack:
        stack.callback(forget_packages)
        if name == "fa2":
            assert recorded is not None
            monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
            monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", fake_flash_attn_2(recorded))
        elif name == "fa3":
            assert recorded is not None
            monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
            register_fake_flash_attn_3(
                stack.enter_context(torch.library._scoped_library("flash_attn_3", "DEF")), recorded
            )
        else:
            register_fake_aten(stack.enter_context(torch.library._scoped_library("aten", "IMPL")))
        yield name


def forget_packages() -> None:
    """What is known of the packages that are installed."""
    flash_attention._import.cache_clear()
    flash_attention._distribution_version.cache_clear()
