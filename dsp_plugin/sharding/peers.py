"""What the ranks of one sequence must have alike before they compute: samples, weights, buffers and random numbers.

They hold parts of one sample and of one model. A script that was written for data parallelism may seed by rank, or read
other samples on every rank: shapes fit, nothing fails, and what is learnt is wrong. So the first passes compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.consent import answers, of_all
from dsp_plugin.derivatives import refuse_transforms
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.sharding.averaging import mesh_of
from dsp_plugin.sharding.compiling import uncompiled
from dsp_plugin.training.randomness import share_generators
from dsp_plugin.training.same_sample import CHECKED_FORWARDS, SameSampleCheck, digest

_SAMPLES = (
    "Give your DataLoader batch_sampler=dsp_plugin.SequenceParallelBatchSampler(len(dataset), groups=groups, "
    "global_batch_size=..., micro_batch_size=...), or sampler=DistributedSampler(dataset, "
    "num_replicas=groups.dp.size, rank=groups.dp.rank). Noise and augmentations must be drawn equally on the ranks of "
    "one sequence, too: seed by groups.dp.rank, not by the global rank."
)


class EqualPeers:
    """Compares in a module's first passes.

    Random numbers are made equal in the first training pass, to those of the first rank: until then scripts seed as
    they like. Parameters that are sharded over ranks are one model whatever ranks started from, and not compared.

    Attributes:
        alone: whether the module now computes without its peers; None for one that never does, nor its copies.
        samples: compares what peers are given.
    """

    def __init__(self, module: nn.Module, groups: SequenceParallelGroups) -> None:
        self._module, self._groups, self._sp = module, groups, groups.sp
        self.alone: Callable[[], bool] | None = None
        self.samples = SameSampleCheck(groups.sp, _SAMPLES)
        self._weighed = False
        self._training_passes = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> EqualPeers:
        # A copy of the model, such as one of averaged weights, is sharded by the same groups, or by none.
        if self.alone is None:
            return self
        copied = EqualPeers(self._module, self._groups)
        copied.alone = lambda: True
        return copied

    def attach(self, undo: list[Callable[[], object]]) -> None:
        """Hook the module, adding to ``undo`` what takes the hook off."""
        undo.append(self._module.register_forward_pre_hook(self._before, with_kwargs=True).remove)

    @uncompiled
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not answers(self._sp) or (self.alone is not None and self.alone()):
            return
        refuse_transforms("a sharded model", *(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)))
        self.samples.compare(module.training, args, kwargs)
        if not self._weighed:
            _compare_weights(module, self._sp)
            self._weighed = True
        if module.training and self._training_passes < CHECKED_FORWARDS:
            self._compare_generators()
            self._training_passes += 1

    def _compare_generators(self) -> None:
        states = of_all([crc32(torch.get_rng_state().numpy().tobytes())], self._sp)
        if all(state == states[0] for state in states):
            return
        if self._training_passes == 0:
            share_generators(self._sp)
            return
        raise SequenceParallelConfigError(
            f"the random numbers of ranks {list(self._sp.ranks)}, which share one sequence, were equal in the first "
            f"training pass and are not in pass {self._training_passes + 1}, so they would drop unlike parts of it. "
            "Seed by groups.dp.rank, and let all of them draw alike: what one rank alone draws, for logs or in an "
            "evaluation of its own, it draws from a torch.Generator of its own."
        )


def _compare_weights(module: nn.Module, sp: Axis) -> None:
    """Collective.

    Raises:
        SequenceParallelConfigError: parameters or buffers differ.
    """
    mine = {
        f"{kind} {name}": digest(tensor)
        for kind, found in (("parameter", module.named_parameters()), ("buffer", module.named_buffers()))
        for name, tensor in found
        if mesh_of(tensor) is None
    }
    total = crc32(repr(mine).encode())
    if len({tuple(row) for row in of_all([total], sp)}) == 1:
        return
    everyone: list[dict[str, int]] = [{} for _ in range(sp.size)]
    dist.all_gather_object(everyone, mine, group=sp.group)
    names = [name for name in mine if any(other.get(name) != mine[name] for other in everyone)]
    raise SequenceParallelConfigError(
        f"the ranks {list(sp.ranks)} share one sequence, but not one model: {len(names)} of its parameters and buffers "
        f"differ between them, such as {', '.join(names[:3])}. Seed alike on all ranks before the model is made, or "
        "load the same weights on all; DistributedDataParallel, put around the model, sends those of its first rank to "
        "all."
    )
