"""Checkpointed stretches are recomputed without attention: what is computed, sent and kept, by method and by way."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpointed import ORDINARY, WAYS, Storages, Through, whole
from torch import Tensor, nn

from dsp_plugin import Layout, MaskSpec, SequenceParallelConfig, SequenceParallelGroups, ledger, parallelize
from dsp_plugin.kernels import calls
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.head_partition import head_partition
from dsp_plugin.methods.method import Where
from dsp_plugin.patches import recompute as patches
from dsp_plugin.spawn import spawn
from dsp_plugin.training.recompute import Tape

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

# Method -> ranks, Ulysses size, layout.
WORLDS: dict[str, tuple[int, int, Any]] = {
    "ring": (3, 1, "zigzag"),
    "usp": (4, 2, "zigzag"),
    "lightseq": (4, 1, "contiguous"),
    "ulysses": (2, 2, "contiguous"),
}
BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM, DEPTH = 2, 24, 6, 2, 4, 2
ODD_LENGTH = 13
WIDTH = HEADS * HEAD_DIM


def build(method: str) -> SequenceParallelGroups:
    size, ulysses, _ = WORLDS[method]
    sizes = {"ulysses_size": ulysses, "ring_size": size // ulysses}
    return SequenceParallelGroups.build(SequenceParallelConfig(method=method, size=size, **sizes))


class Layer(nn.Module):
    """A transformer layer with dropout of attention weights and of activations."""

    def __init__(self, method: str, groups: SequenceParallelGroups, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.method, self.groups, self.dropout = method, groups, dropout

    def forward(self, x_BnC: Tensor) -> Tensor:
        q, k, v = self.qkv(x_BnC).unflatten(-1, (-1, HEAD_DIM)).split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        # Drawn outside of attention, so that recomputation draws as many numbers as the first run did.
        seed = int(torch.randint(2**62, ()))
        attention = METHODS[self.method].attention
        assert attention is not None
        out = attention(
            q,
            k,
            v,
            what=AttentionSpec(
                MaskSpec(causal=True), dropout_p=self.dropout, dropout_seed=seed if self.dropout else None
            ),
            where=Where(self.groups, Layout(WORLDS[self.method][2], LENGTH, self.groups.sp.size)),
        )
        x_BnC = x_BnC + F.dropout(self.out(out.flatten(2)), 0.2)
        return x_BnC + F.dropout(self.mlp(x_BnC), 0.2)


def train(method: str, groups: SequenceParallelGroups, way: tuple[Through, Through, bool]) -> dict[str, Any]:
    """Two forward passes, then their backward passes: gradients, and what happened in the backward passes."""
    around_all, around_each, patched = way
    torch.manual_seed(1)
    layers = nn.ModuleList(Layer(method, groups, 0.25) for _ in range(DEPTH)).double()
    layout = Layout(WORLDS[method][2], LENGTH, groups.sp.size)
    batches = torch.randn(2, BATCH, LENGTH, WIDTH, dtype=torch.float64)

    def stack(x: Tensor) -> Tensor:
        for layer in layers:
            x = around_each(layer, x)
        return x

    with ExitStack() as stack_of_patches:
        if patched:
            stack_of_patches.callback(patches.hold(patches.TORCH, keep=True))
        inputs = [layout.shard(x, 1, groups.sp.rank).clone().requires_grad_() for x in batches]
        with ledger() as sent, calls() as made:
            losses = [around_all(stack, x).square().sum() for x in inputs]
        forward = (made.forward, sent.bytes(phase="forward"))
        with ledger() as sent, calls() as made:
            for loss in losses:
                loss.backward()
    return {
        "gradients": [*(x.grad for x in inputs), *(parameter.grad for parameter in layers.parameters())],
        "losses": [loss.item() for loss in losses],
        "forward": forward,
        "again": (made.forward, sent.bytes(phase="forward")),
        "backward": (made.backward, sent.bytes(phase="backward")),
        "random": torch.rand(()).item(),
    }


def run(method: str) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[int, int, int, int]]]:
    """All that the tests of a method ask for, in one world."""
    groups = build(method)
    ways = {"none": (whole, whole, False), **ORDINARY, **WAYS}
    return {name: train(method, groups, way) for name, way in ways.items()}, kept_bytes(method, groups)


@cache
def results(method: str) -> list[Any]:
    return spawn(run, WORLDS[method][0], method, timeout=90)


def runs(method: str) -> list[dict[str, dict[str, Any]]]:
    """What each rank found, by way."""
    return [by_way for by_way, _ in results(method)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", WORLDS)
def test_backward_computes_and_sends_no_attention_again(method: str, way: str) -> None:
    for found in runs(method):
        assert found["none"]["forward"] == found[way]["forward"]
        assert min(found[way]["forward"]) > 0
        assert found[way]["again"] == (0, 0)
        assert found[way]["backward"] == found["none"]["backward"]


@pytest.mark.parametrize("way", ORDINARY)
@pytest.mark.parametrize("method", WORLDS)
def test_ordinary_checkpointing_does_all_of_it_again(method: str, way: str) -> None:
    for found in runs(method):
        assert found[way]["again"] == found["none"]["forward"]


@pytest.mark.parametrize("way", [*WAYS, *ORDINARY])
@pytest.mark.parametrize("method", WORLDS)
def test_same_gradients_and_random_numbers_as_without_checkpointing(method: str, way: str) -> None:
    for found in runs(method):
        assert found[way]["losses"] == found["none"]["losses"]
        assert found[way]["random"] == found["none"]["random"]
        for ours, theirs in zip(found[way]["gradients"], found["none"]["gradients"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


SHAPES = {
    "grouped heads": (6, 2, 8, 8),
    "uneven heads, a group cut between ranks": (5, 1, 8, 8),
    "a key/value head for each query head": (7, 7, 4, 4),
    "values of another width": (4, 2, 8, 6),
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def formula(method: str, groups: SequenceParallelGroups, shape: tuple[int, ...], length: int, dtype: Any) -> int:
    """As in the docstring of `dsp_plugin.training.recompute`."""
    heads, kv_heads, d, dv = shape
    layout = Layout(WORLDS[method][2], length, groups.sp.size)
    e, w = dtype.itemsize, max(dtype.itemsize, 4)
    n = layout.sizes[groups.sp.rank]
    if method in ("ring", "lightseq"):
        return BATCH * n * heads * (dv * e + w)
    part = head_partition(heads, kv_heads, groups.ulysses.size)
    h, k = len(part.queries[groups.ulysses.rank]), len(part.keys[groups.ulysses.rank])
    gathered = sum(layout.sizes[groups.sp.ranks.index(rank)] for rank in groups.ulysses.ranks)
    return BATCH * gathered * (h * (d * e + dv * e + w) + k * (d + dv) * e) + BATCH * n * heads * dv * e


def kept_bytes(method: str, groups: SequenceParallelGroups) -> dict[str, tuple[int, int, int, int]]:
    """By shape and dtype: the formula, the tape's own account, what the process holds, and what after backward."""
    attention = METHODS[method].attention
    assert attention is not None
    layout = Layout(WORLDS[method][2], ODD_LENGTH, groups.sp.size)
    # The math kernel pads nothing.
    settings = {"what": AttentionSpec(MaskSpec(causal=True), kernel="math"), "where": Where(groups, layout)}
    found = {}
    for name, dtype in [*product(SHAPES, DTYPES[:1]), *product(list(SHAPES)[:1], DTYPES[1:])]:
        shape = heads, kv_heads, d, dv = SHAPES[name]
        ends = ((heads, d), (kv_heads, d), (kv_heads, dv))
        inputs = [torch.randn(BATCH, layout.sizes[groups.sp.rank], *end, dtype=dtype) for end in ends]
        tape = Tape()
        with Storages() as storages, tape.record():
            attention(*(x + 0 for x in inputs), **settings)
        kept = tape.nbytes()
        held = storages.settled(kept)
        with tape.replay():
            attention(*(x.requires_grad_() for x in inputs), **settings).sum().backward()
        expected = formula(method, groups, shape, ODD_LENGTH, dtype)
        found[f"{name}, {dtype}"] = (expected, kept, held, tape.nbytes() + storages.settled(0))
    return found


@pytest.mark.parametrize("method", WORLDS)
def test_bytes_kept_are_those_of_the_formula_and_of_the_process(method: str) -> None:
    for _, found in results(method):
        assert len(found) == len(SHAPES) + len(DTYPES) - 1
        for name, (expected, kept, held, after) in found.items():
            assert kept == expected > 0, name
            assert held == kept, name
            assert after == 0, name


def test_parallelize_keeps_attention_as_long_as_its_hooks_are_on() -> None:
    for setting, kept in (("full", False), ("keep_attention", True)):
        settings = {"attention": ["attn"], "batch": {"x": 1}, "gather_output": 1, "positions": None}
        config = SequenceParallelConfig(method="ring", size=1, recompute=setting, quiet=True, **settings)
        handle = parallelize(Attending(), config=config, groups=SequenceParallelGroups.single())
        assert patches.kept() == kept
        handle.remove()
        assert not patches.kept()


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x
