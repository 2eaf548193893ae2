"""The line at the start of a run, for every method and setting that it depends on, and who stays silent."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsp_plugin import Plan, SequenceParallelConfig, SequenceParallelGroups, Stage, parallelize
from dsp_plugin.config import start_line
from dsp_plugin.config.start_line import BY_PLAN, announce
from dsp_plugin.kernels import KERNELS, triton_usable
from dsp_plugin.kernels.candidates import candidates_in_words
from dsp_plugin.kernels.torch_flash import CudaFlash
from dsp_plugin.sharding.parallelize import hooked

BY_MATH = "math (fp32, some 250 launches a tile)"
BEGIN = f"dsp_plugin {metadata.version('dsp-plugin')} | "
BATCH = {"batch": {"x": 1}, "attention": ["attention"], "positions": None, "gather_output": 1}


@pytest.fixture(autouse=True)
def nothing_printed_yet() -> Iterator[None]:
    start_line._print_once.cache_clear()
    yield
    start_line._print_once.cache_clear()


def line(capsys: pytest.CaptureFixture[str], settings: dict[str, Any], **known: Any) -> str:
    """What `announce` prints of a run on CPU, behind the version."""
    config = SequenceParallelConfig(**{"size": 4, **settings})
    announce(config, **{"order": f"tokens {config.layout_for()}", "devices": ("cpu",), **known})
    printed = capsys.readouterr()
    assert not printed.err
    assert printed.out.startswith(BEGIN)
    assert printed.out.count("\n") == 1
    return printed.out.removeprefix(BEGIN).rstrip("\n")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "ulysses"}, "ulysses over 4 ranks (U 4 x R 1, adjacent) | tokens contiguous"),
        ({"method": "ring"}, "ring over 4 ranks (U 1 x R 4, adjacent) | tokens zigzag"),
        ({"method": "ring", "layout": "contiguous"}, "ring over 4 ranks (U 1 x R 4, adjacent) | tokens contiguous"),
        ({"method": "ring", "layout": "striped"}, "ring over 4 ranks (U 1 x R 4, adjacent) | tokens striped"),
        (
            {"method": "usp", "ulysses_size": 2, "ulysses_order": "strided"},
            "usp over 4 ranks (U 2 x R 2, strided) | tokens zigzag",
        ),
        ({"method": "lightseq"}, "lightseq over 4 ranks (U 1 x R 4, adjacent) | tokens contiguous"),
        ({"method": "ulysses", "size": 1}, "ulysses over 1 rank (U 1 x R 1, adjacent) | tokens contiguous"),
        (
            {"method": "lasp"},
            "lasp over 4 ranks (exchange auto; softmax by lightseq, U 1 x R 4, adjacent) | tokens contiguous",
        ),
        (
            {"method": "lasp", "exchange": "allgather", "softmax_method": "ring", "layout": "zigzag"},
            "lasp over 4 ranks (exchange allgather; softmax by ring, U 1 x R 4, adjacent) | tokens zigzag",
        ),
    ],
)
def test_methods_and_orders(capsys: pytest.CaptureFixture[str], settings: dict[str, Any], expected: str) -> None:
    kernel = "linear kernel chunked | softmax kernel" if settings["method"] == "lasp" else "kernel"
    where = " where a stage computes along the sharded dim" if settings["method"] == "dsp" else ""
    assert line(capsys, settings, dropout=False) == f"{expected} | {kernel} cpu_flash{where}"


@pytest.mark.parametrize(
    ("settings", "known", "expected"),
    [
        ({}, {}, "kernel cpu_flash, else math"),
        ({"kernel": "math"}, {}, "kernel math"),
        ({}, {"checkpointing": True, "dropout": False}, "kernel cpu_flash | recompute full"),
        ({"recompute": "keep_attention"}, {"dropout": False}, "kernel cpu_flash"),
        (
            {"recompute": "keep_attention"},
            {"dropout": False, "checkpointing": True},
            "kernel cpu_flash | recompute keep_attention",
        ),
        (
            {"recompute": "keep_attention"},
            {"attention": False, "checkpointing": True},
            "attention the model's own | recompute full",
        ),
        (
            {},
            {"attention": False, "patched": "deepspeed 0.19.8 (14 patches)"},
            "attention the model's own | patched deepspeed 0.19.8 (14 patches)",
        ),
    ],
)
def test_what_follows(
    capsys: pytest.CaptureFixture[str], settings: dict[str, Any], known: dict[str, Any], expected: str
) -> None:
    found = line(capsys, {"method": "ulysses", **settings}, order=BY_PLAN, **known)
    assert found == f"ulysses over 4 ranks (U 4 x R 1, adjacent) | dims by plan | {expected}"


@pytest.mark.parametrize(
    ("dtype", "dropout", "expected"),
    [
        (None, True, f"cuda_flash, else math; dropout by {BY_MATH}"),
        (torch.bfloat16, True, f"cuda_flash, else math; dropout by {BY_MATH}"),
        (torch.bfloat16, False, "cuda_flash, else math"),
        (torch.float32, True, f"math for float32; dropout by {BY_MATH}"),
        (torch.float32, False, "math for float32"),
    ],
)
def test_kernels_on_cuda(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, dropout: bool, expected: str
) -> None:
    """With torch's own alone: of bf16, head dims beyond 256 are left to `math`."""
    for name, kernel in KERNELS.items():
        if name in ("fa3", "fa2"):
            monkeypatch.setattr(type(kernel), "available", lambda self: (False, "not installed"))
    monkeypatch.setattr(CudaFlash, "available", lambda self: (True, "built into torch"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert candidates_in_words(["cuda"], dtype, dropout) == expected


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_dropout_on_cuda_where_triton_is(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None) -> None:
    """It takes no attention without dropout from the others."""
    for name, kernel in KERNELS.items():
        if name in ("fa3", "fa2"):
            monkeypatch.setattr(type(kernel), "available", lambda self: (False, "not installed"))
    monkeypatch.setattr(CudaFlash, "available", lambda self: (True, "built into torch"))
    monkeypatch.setattr(triton_usable, "unusable", lambda: None)
    monkeypatch.setattr(triton_usable, "refused", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    words = candidates_in_words(["cuda"], dtype)
    flash = "math for float32" if dtype == torch.float32 else "cuda_flash, else math"
    # Head dims beyond 256 are left to math.
    assert words == f"{flash}; dropout by triton (3 launches a block), else {BY_MATH}"
    assert "triton" not in candidates_in_words(["cuda"], dtype, dropout=False)


def test_kernels_where_the_device_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaFlash, "available", lambda self: (True, "built into torch"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert candidates_in_words(["cuda", "cpu"], torch.float32, dropout=False) == "cpu_flash, else math for float32"
    assert candidates_in_words(["meta"]) == "math"


def test_only_the_first_rank_says_it_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    known: dict[str, Any] = {"order": "tokens zigzag", "devices": ("cpu",)}
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    announce(SequenceParallelConfig(method="ring", size=2), **known)
    assert not capsys.readouterr().out
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    announce(SequenceParallelConfig(method="ring", size=2, quiet=True), **known)
    assert not capsys.readouterr().out
    for method in ("ring", "ring", "ulysses", "ring"):
        announce(SequenceParallelConfig(method=method, size=2), **known)
    assert [text.split(" | ")[1].split()[0] for text in capsys.readouterr().out.splitlines()] == ["ring", "ulysses"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = x.unsqueeze(1)
        return self.out(nn.functional.scaled_dot_product_attention(q, q, q).squeeze(1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


@pytest.mark.parametrize(
    ("settings", "plan", "expected"),
    [
        (
            {"method": "ring", **BATCH},
            None,
            "ring over 1 rank (U 1 x R 1, adjacent) | tokens zigzag | kernel cpu_flash, else math\n",
        ),
        (
            {"method": "dsp"},
            Plan("b t s c", (Stage("attention", ("t",)),)),
            "dsp over 1 rank (U 1 x R 1, adjacent) | dims by plan | attention the model's own\n",
        ),
        (
            {"method": "dsp"},
            Plan("b t s c", (Stage("attention", ("t",), attention="out", heads=1),)),
            "dsp over 1 rank (U 1 x R 1, adjacent) | dims by plan | "
            "kernel cpu_flash, else math where a stage computes along the sharded dim\n",
        ),
        (
            {"method": "ulysses"},
            Plan("b t c", (Stage("attention", ("t",), attention="out", heads=1),)),
            "ulysses over 1 rank (U 1 x R 1, adjacent) | dims by plan | kernel cpu_flash, else math\n",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="names kernels of a machine without CUDA")
def test_parallelize_says_what_it_did_and_checks_say_nothing(
    capsys: pytest.CaptureFixture[str], settings: dict[str, Any], plan: Plan | None, expected: str
) -> None:
    config, groups = SequenceParallelConfig(size=1, **settings), SequenceParallelGroups.single()
    hooked(Model(), plan, config=config, groups=groups)
    parallelize(Model(), plan, config=SequenceParallelConfig(size=1, quiet=True, **settings), groups=groups)
    assert not capsys.readouterr().out
    parallelize(Model(), plan, config=config, groups=groups)
    assert capsys.readouterr().out == BEGIN + expected


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ("auto", "memory auto"),
        ({"tile_tokens": 4096, "offload": True}, "memory tile_tokens 4096, offload"),
        ({"mlp_tiles": 8, "attention_rounds": "2GiB"}, "memory mlp_tiles 8, attention_rounds 2,147,483,648 bytes"),
        ({"mlp_tiles": 1, "offload": False}, ""),
    ],
)
def test_what_is_traded_for_memory(capsys: pytest.CaptureFixture[str], memory: Any, said: str) -> None:
    parts = line(capsys, {"method": "ulysses", "memory": memory}).split(" | ")
    assert [part for part in parts if part.startswith("memory")] == ([said] if said else [])
