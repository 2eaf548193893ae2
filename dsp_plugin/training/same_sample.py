"""Finds sequence peers that were given different samples, in the first passes, before they learn from them.

Peers that hold parts of one sample must be given that same sample. A `DataLoader` that the script made for plain data
parallelism gives every rank its own: shapes fit, nothing fails, and attention mixes tokens of different samples. So the
inputs of the first forwards are compared by digest, which costs one small all-gather each.

Tensors that an earlier part of the model computed are compared by shape alone: ranks may round them differently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.consent import answers, of_all
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.training.copies import LeftBehind

CHECKED_FORWARDS = 4
SAMPLED_ELEMENTS = 1 << 16
# Odd 63-bit constants: int64 products wrap, which mixes high and low bits.
_STEP, _START = 0x1E3779B97F4A7C15, 0x2545F4914F6CDD1D


class SameSampleCheck:
    """Compares a module's forward inputs across a sequence group.

    Attributes:
        alone: whether the module now computes without its peers, who may not call it at all.
        always: whether every forward is checked from now on, as where peers train on what each computed for itself.

    Args:
        sp: the sequence axis. In debug mode every forward is checked, else the first `CHECKED_FORWARDS` in training
            and as many in evaluation.
        remedy: how peers get the same samples, for the error.
    """

    def __init__(self, sp: Axis, remedy: str) -> None:
        self._sp, self._remedy = sp, remedy
        self._seen = {True: 0, False: 0}
        self.alone: Callable[[], bool] = lambda: False
        self.always: Callable[[], bool] = lambda: False

    def attach(self, module: nn.Module) -> RemovableHandle:
        """Hooks the module. Call before the module is parallelized: inputs are compared before they are sharded."""
        return module.register_forward_pre_hook(LeftBehind(self._check), with_kwargs=True)

    def _check(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not self.alone():
            self.compare(module.training, args, kwargs)

    def compare(self, training: bool, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
        """Compares what a forward, or a loss, is about to be given whole. Collective.

        Raises:
            SequenceParallelConfigError: peers were given different samples.
        """
        enough = self._seen[training] >= CHECKED_FORWARDS and not self._sp.debug and not self.always()
        if enough or not answers(self._sp):
            return
        self._seen[training] += 1
        leaves = list(described_leaves(args, kwargs))
        of_peers = of_all([len(leaves), combined(leaves)], self._sp)
        if any(other != of_peers[0] for other in of_peers):
            self._refuse(leaves)

    def _refuse(self, leaves: list[Leaf]) -> None:
        """Every peer got the same digests, so every peer comes here."""
        everyone: list[list[Leaf]] = [[] for _ in range(self._sp.size)]
        dist.all_gather_object(everyone, leaves, group=self._sp.group)
        found = [
            difference
            for peer, leaves_there in zip(self._sp.ranks[1:], everyone[1:], strict=True)
            for difference in _differences(self._sp.ranks[0], everyone[0], peer, leaves_there)
        ]
        raise SequenceParallelConfigError(
            f"sequence peers got different samples: ranks {list(self._sp.ranks)} share one sequence, but their forward "
            f"inputs differ: {'; '.join(found[:3])}{'; ...' if len(found) > 3 else ''}. {self._remedy}"
        )


@dataclass(frozen=True)
class Leaf:
    """One input: its name, what it is, and the digest of its content."""

    name: str
    kind: str
    content: int

    def __str__(self) -> str:
        return f"'{self.name}' {self.kind} (digest {self.content & 0xFFFFFFFF:08x})"


def _differences(first: int, ours: list[Leaf], peer: int, theirs: list[Leaf]) -> list[str]:
    if len(ours) != len(theirs):
        return [f"rank {first} has {len(ours)} inputs, rank {peer} has {len(theirs)}"]
    return [f"rank {first} has {a}, rank {peer} has {b}" for a, b in zip(ours, theirs, strict=True) if a != b]


def described_leaves(args: Sequence[object], kwargs: Mapping[str, object]) -> Iterator[Leaf]:
    """Tensors, numbers and strings in the arguments, in a fixed order; other objects are not compared."""
    yield from _walk("", dict(enumerate(args)))
    yield from _walk("", dict(sorted(kwargs.items())))


def _walk(name: str, value: object) -> Iterator[Leaf]:
    match value:
        case Tensor():
            kind = f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
            yield Leaf(name, kind, digest(value) if value.grad_fn is None else 0)
        case str() | int() | float():
            yield Leaf(name, type(value).__name__, crc32(repr(value).encode()))
        case Mapping():
            for key, item in value.items():
                yield from _walk(f"{name}.{key}" if name else str(key), item)
        case list() | tuple():
            for index, item in enumerate(value):
                yield from _walk(f"{name}[{index}]", item)


def digest(tensor: Tensor) -> int:
    """A 64-bit checksum of up to `SAMPLED_ELEMENTS` evenly spaced elements, by bits and position."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.numel() == 0:
        return 0
    flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    flat = flat.detach().reshape(-1)
    flat = flat[:: -(-flat.numel() // SAMPLED_ELEMENTS)].contiguous()
    width = flat.element_size()
    bits = flat.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width]).to(torch.int64)
    position = torch.arange(bits.numel(), device=bits.device)
    mixed = (bits + _START) * (position * _STEP + _START)
    return int((mixed ^ (mixed >> 29)).sum().item())


def combined(leaves: Sequence[Leaf]) -> int:
    """One non-negative 63-bit number for all leaves, names and kinds included."""
    total = 0
    for leaf in leaves:
        total = (total * 1_000_003 + leaf.content + crc32(f"{leaf.name} {leaf.kind}".encode())) & (2**63 - 1)
    return total
