"""Random numbers that sequence peers must share, whatever seeds the script set on its ranks.

Two streams matter. Outside the module, the script draws noise, times and augmentations that belong to a sample, which
all peers of a sequence group hold: their generators start equal. Inside the module, a peer with more local tokens draws
more, so generators would drift apart; each training forward therefore draws from a seed of its own and leaves the outer
stream as it found it.
"""

from __future__ import annotations

import weakref
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from dsp_plugin.comm.axis import Axis
from dsp_plugin.training.copies import LeftBehind
from dsp_plugin.training.randomness import share_generators


def share(axis: Axis) -> None:
    """Sets the generators of python, numpy, torch and the accelerator to those of the axis's first rank. Collective."""
    share_generators(axis)
    state = _torch_state()
    if axis.size > 1 and state["accelerator"] is not None:
        box = [state["accelerator"]]
        dist.broadcast_object_list(box, src=axis.ranks[0], group=axis.group)
        _restore_torch({**state, "accelerator": box[0]})


def shared_seed(axis: Axis) -> int:
    """The torch seed of the first rank of the axis, on all its ranks. Collective."""
    box = [torch.initial_seed()]
    if axis.size > 1:
        dist.broadcast_object_list(box, src=axis.ranks[0], group=axis.group)
    return box[0]


class ForwardSeed:
    """Seeds each training forward of a module by (seed, replica, micro step, forward within it): equally on peers.

    What is drawn from sharded tokens is then drawn from one stream per peer, all equal: peers drop the same pattern of
    their own tokens, as data-parallel ranks with one seed do.

    Args:
        seed: shared by the sequence group.
        replica: rank on the data-parallel axis, so replicas drop different activations.
        engine: its `micro_steps` survives checkpoints, so a resumed run continues the sequence of seeds.
    """

    def __init__(self, seed: int, replica: int, engine: Any) -> None:
        self._seed, self._replica = seed, replica
        self._engine = weakref.ref(engine)
        self._micro_step, self._call = -1, 0
        self._outer: dict[str, Any] | None = None

    def attach(self, module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        """Hooks the module: outermost, so that everything it draws is inside."""
        return (
            module.register_forward_pre_hook(LeftBehind(self._enter), prepend=True),
            module.register_forward_hook(LeftBehind(self._leave), always_call=True),
        )

    def _enter(self, module: nn.Module, args: object) -> None:
        engine = self._engine()
        if not module.training or engine is None:
            return
        micro_step = getattr(engine, "micro_steps", 0)
        self._call = self._call + 1 if micro_step == self._micro_step else 0
        self._micro_step = micro_step
        key = f"{self._seed}/{self._replica}/{micro_step}/{self._call}".encode()
        self._outer = _torch_state()
        torch.manual_seed(int.from_bytes(blake2b(key, digest_size=7).digest(), "little"))

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if self._outer is not None:
            _restore_torch(self._outer)
            self._outer = None


def _torch_state() -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    return {
        "cpu": torch.get_rng_state(),
        "accelerator": None if accelerator.device_name() == "cpu" else accelerator.get_rng_state(),
    }


def _restore_torch(state: dict[str, Any]) -> None:
    from deepspeed.accelerator import get_accelerator

    torch.set_rng_state(state["cpu"])
    if state["accelerator"] is not None:
        get_accelerator().set_rng_state(state["accelerator"])
