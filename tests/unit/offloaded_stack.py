"""Layers that are checkpointed one by one, and a step of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from checkpointed import Through, non_reentrant, reentrant
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dsp_plugin import Layout, MaskSpec, SequenceParallelGroups
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.method import Where
from dsp_plugin.patches import recompute as patches
from dsp_plugin.training.offload import Offload

BATCH, LENGTH, HEADS, DIM = 2, 7, 2, 4
WIDTH = HEADS * DIM
ONE = BATCH * LENGTH * WIDTH * 8
"""Bytes that a layer's checkpoint keeps."""
EACH = [non_reentrant, reentrant]


@contextmanager
def held(offload: Offload | None, *, keep: bool = False) -> Iterator[None]:
    release = patches.hold(patches.TORCH, keep=keep, offload=offload)
    try:
        yield
    finally:
        release()


class Layer(nn.Module):
    """Attention, dropout, and an input that is needed again at the end; tells who looks when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.look: Callable[[], None] = lambda: None

    def forward(self, x_BLC: Tensor) -> Tensor:
        self.look()
        q, k, v = self.qkv(x_BLC).unflatten(-1, (-1, DIM)).split(HEADS, dim=2)
        out = METHODS["ring"].attention(
            q,
            k,
            v,
            what=AttentionSpec(MaskSpec(causal=True)),
            where=Where(SequenceParallelGroups.single(), Layout("contiguous", LENGTH, 1)),
        )
        return x_BLC + nn.functional.dropout(self.out(out.flatten(2)), 0.3)


class Stack(nn.Module):
    """Layers, each through a checkpoint. ``inputs`` are the storages that they were given."""

    def __init__(self, each: Through, depth: int = 4, whole: Through | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(Layer() for _ in range(depth)).double()
        self.each, self.whole = each, whole or (lambda body, x: body(x))
        self.inputs: list[StorageWeakRef] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(self.body, x * 1)

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            self.inputs.append(StorageWeakRef(x.untyped_storage()))
            x = self.each(layer, x)
        return x

    def alive(self) -> list[bool]:
        return [not storage.expired() for storage in self.inputs]


def example() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()


def trained(model: nn.Module, *, backward: Callable[[Tensor], object] = Tensor.backward) -> list[Tensor]:
    """The loss of a step and its gradients."""
    model.zero_grad()
    torch.manual_seed(2)
    x = example()
    loss = model(x).square().sum()
    backward(loss)
    assert x.grad is not None
    return [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))
