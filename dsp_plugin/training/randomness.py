"""Random numbers inside a sharded region: other ones on every rank, the same ones when a stretch is recomputed.

Ranks of a sequence group hold other tokens, so layers that drop activations must draw other numbers on each; before and
after the region all ranks compute the same, and must draw the same. So torch's generators are set aside when a training
forward enters the region, seeded by rank inside it, and put back when it leaves. Attention gets seeds that are the same
on all ranks, since which weights it drops must not depend on the sharding.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist

from dsp_plugin.comm.axis import Axis
from dsp_plugin.errors import UnsupportedError


@dataclass(frozen=True)
class RegionSeed:
    """Seeds of one forward pass through a region.

    Attributes:
        base: taken from the state of torch's CPU generator at the entry, which all ranks must have alike.
        rank: on the sequence axis.
    """

    base: str
    rank: int

    def apply(self) -> None:
        """Seed this rank's generators, at the entry and again where the entry is recomputed."""
        torch.manual_seed(self._seed(f"rank {self.rank}"))

    def of_attention(self, module: str) -> int:
        """The dropout seed of an attention module: the same on every rank, and when it is recomputed."""
        return self._seed(f"attention {module}")

    def _seed(self, what: str) -> int:
        return int.from_bytes(blake2b(f"{self.base}/{what}".encode(), digest_size=7).digest(), "little")


class RegionVisit:
    """One forward pass inside a region, from construction until `leave`.

    Attributes:
        seed: this pass's seeds.
    """

    def __init__(self, axis: Axis) -> None:
        self._outer = _state()
        self.seed = RegionSeed(blake2b(self._outer[0].numpy().tobytes(), digest_size=16).hexdigest(), axis.rank)
        self.seed.apply()
        self._entered = _state()
        self._left = False

    def leave(self) -> None:
        """Put the generators back; one step further if the region drew from them, so that the next visit differs.

        Once: whoever ends a pass may come after others that did.
        """
        if self._left:
            return
        self._left = True
        drew = any(not torch.equal(now, then) for now, then in zip(_state(), self._entered, strict=True))
        torch.set_rng_state(self._outer[0])
        if len(self._outer) > 1:
            torch.cuda.set_rng_state(self._outer[1])
        if drew:
            torch.rand((), device="cpu")


def _state() -> list[torch.Tensor]:
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def draw_seed(device: torch.device) -> int:
    """A seed from torch's generator of a device, which is one step further then: whoever sets it back draws it again.

    On CUDA from the generator's state, which is on the host: the device is not waited for.

    Raises:
        UnsupportedError: a CUDA graph is being captured, whose every replay would have the same seed.
    """
    if device.type != "cuda":
        return int(torch.randint(2**62, (), device=device).item())
    if torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            setting="attention dropout in a CUDA graph",
            why="its seed is a number of the host, so every replay would drop the same weights",
            remedy="set the attention dropout to 0, or capture no graph around attention",
        )
    state = torch.cuda.get_rng_state(device)
    seed = int.from_bytes(blake2b(state.numpy().tobytes(), digest_size=7).digest(), "little")
    # The state ends with the offset into the generator's numbers, of which a draw takes four.
    moved = state.clone()
    moved[-8:].view(torch.int64).add_(4)
    torch.cuda.set_rng_state(moved, device)
    return seed


def share_generators(axis: Axis) -> None:
    """Set the generators of python, numpy and torch to the state of those of the axis's first rank. Collective."""
    if axis.size == 1:
        return
    numpy = sys.modules.get("numpy")
    box: list[Any] = [(random.getstate(), None if numpy is None else numpy.random.get_state(), _state())]
    dist.broadcast_object_list(box, src=axis.ranks[0], group=axis.group)
    of_python, of_numpy, of_torch = box[0]
    random.setstate(of_python)
    if numpy is not None and of_numpy is not None:
        numpy.random.set_state(of_numpy)
    for put_back, state in zip((torch.set_rng_state, torch.cuda.set_rng_state), of_torch, strict=False):
        put_back(state)
