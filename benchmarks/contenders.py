"""Attention calls that compete: the methods, the local kernel, and the most that the machine can give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import Samples, in_turns
from benchmarks.result import Row
from dsp_plugin.comm.ledger import ledger
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.kernels import AttentionSpec, softmax
from dsp_plugin.layout import Layout, LayoutKind
from dsp_plugin.mask import MaskSpec
from dsp_plugin.methods import METHODS
from dsp_plugin.methods.method import Where

LOCAL, CEILING = "local kernel", "machine's ceiling"
CAUSAL = MaskSpec(causal=True)


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention: ``[1, length, heads, head_dim]`` for q, k and v alike, fp32."""

    length: int
    heads: int
    head_dim: int

    def tensors(self) -> tuple[Tensor, ...]:
        """Global q, k, v and gradient of the output; the same on every rank."""
        generator = torch.Generator().manual_seed(self.length)
        size = (1, self.length, self.heads, self.head_dim)
        return tuple(torch.randn(size, generator=generator) for _ in range(4))


@dataclass(frozen=True)
class Contender:
    """A method in a layout."""

    method: str
    layout: LayoutKind

    @property
    def name(self) -> str:
        """As tables show it."""
        return f"{self.method} {self.layout}"


@dataclass(frozen=True)
class Measured:
    """One contender's samples, and the bytes that left each rank in one forward and backward pass."""

    samples: Samples
    sent: list[int]


Step = Callable[[], tuple[Tensor, ...]]


def measure_contenders(
    shape: Shape, contenders: list[Contender], repeats: int, references: bool
) -> dict[str, Measured]:
    """On every rank of the world: forward and backward of every contender, in turns, after a warm-up that also checks.

    Args:
        references: also `LOCAL`, the whole attention on rank 0 while the others wait, and `CEILING`, every rank the
            local kernel on the whole sequence with its share of the heads, nothing sent.
    """
    world = dist.get_world_size()
    sharded = {contender.name: prepared(contender, shape) for contender in contenders}
    steps: dict[str, Step] = {}
    if references:
        steps[LOCAL] = _local(shape) if dist.get_rank() == 0 else tuple
        steps[CEILING] = _share_of_heads(shape)
    steps |= sharded
    sent: dict[str, int] = {}

    def counted(name: str, step: Step) -> Callable[[], None]:
        def run() -> None:
            with ledger() as log:
                step()
            sent[name] = log.bytes()

        return run

    samples = in_turns({name: counted(name, step) for name, step in steps.items()}, repeats)
    sent_by_rank: list[dict[str, int]] = [{}] * world
    dist.all_gather_object(sent_by_rank, sent)
    return {name: Measured(samples[name], [rank[name] for rank in sent_by_rank]) for name in steps}


def as_row(name: str, measured: Measured) -> Row:
    """What every table shares of a contender."""
    cpu = measured.samples.cpu_by_rank
    return {
        "contender": name,
        "seconds": measured.samples.wall,
        "spread": measured.samples.spread,
        "cpu_busiest": max(cpu),
        "balance": sum(cpu) / len(cpu) / max(cpu),
        "sent_mib": sum(measured.sent) / len(measured.sent) / 2**20,
        "repeats": len(measured.samples.repeats),
        "samples": [[asdict(spent) for spent in ranks] for ranks in measured.samples.repeats],
    }


def prepared(contender: Contender, shape: Shape) -> Step:
    """Forward and backward on this rank's tokens, over all ranks of the world; warmed up, and checked at a small size.

    Raises:
        AssertionError: the contender does not compute what the local kernel computes.
    """
    world = dist.get_world_size()
    grid = {"ulysses_size": 2, "ring_size": world // 2} if contender.method == "usp" else {}
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method=contender.method, size=world, **grid))
    _check(contender, groups, Shape(min(shape.length, 2048), shape.heads, shape.head_dim))
    return _sharded(contender, groups, shape)


def _sharded(contender: Contender, groups: SequenceParallelGroups, shape: Shape) -> Step:
    layout = Layout(contender.layout, shape.length, groups.sp.size)
    q, k, v, dout = (layout.shard(x, 1, groups.sp.rank).clone() for x in shape.tensors())
    attention = METHODS[contender.method].attention
    assert attention is not None

    def call(*inputs: Tensor) -> Tensor:
        return attention(*inputs, what=AttentionSpec(CAUSAL), where=Where(groups, layout))

    return _both_passes(call, q, k, v, dout)


def _local(shape: Shape) -> Step:
    return _both_passes(_local_attention, *shape.tensors())


def _share_of_heads(shape: Shape) -> Step:
    world, rank = dist.get_world_size(), dist.get_rank()
    return _both_passes(_local_attention, *(x.tensor_split(world, 2)[rank].contiguous() for x in shape.tensors()))


def _local_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return softmax.attention(q, k, v, AttentionSpec(CAUSAL))


def _both_passes(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Step:
    inputs = [x.requires_grad_() for x in (q, k, v)]

    def step() -> tuple[Tensor, ...]:
        out = call(*inputs)
        return out, *torch.autograd.grad(out, inputs, dout)

    return step


def _check(contender: Contender, groups: SequenceParallelGroups, shape: Shape) -> None:
    """A fast wrong answer is no result."""
    layout = Layout(contender.layout, shape.length, groups.sp.size)
    found, expected = _sharded(contender, groups, shape)(), _local(shape)()
    for name, got, whole in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        error = (got - layout.shard(whole, 1, groups.sp.rank)).abs().max().item()
        assert error < 1e-4, f"{contender.name}: {name} is {error:.1e} off that of the local kernel"
