"""Whether gradients are averaged over the ranks that they have to be averaged over: every rank of the sequence.

A rank's gradients are those of its own tokens, times the number of ranks that share the sequence. Their mean over these
is exact, and nothing else is: over data-parallel ranks alone, every rank would train a model of its own. What averages
is seen in the first passes (DDP and ``fully_shard`` say over whom), and whether anything did in the first optimizer
steps, where the gradients of the ranks of a sequence must be equal.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.consent import answers, of_all
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.sharding.compiling import uncompiled

CHECKED_PASSES = CHECKED_STEPS = 2
# Of a gradient's norm. Ranks may have summed in another order; gradients of other tokens are farther apart.
LARGEST_DIFFERENCE = 1e-2
# Of the largest gradient's norm.
SMALLEST_GRADIENT = 1e-6
SAMPLED_ELEMENTS = 1 << 16
# What averages gradients over whom, in words.
_WHOLE_WORLD = (
    "Use DistributedDataParallel without process_group, or fully_shard over a mesh of all ranks, such as "
    'init_device_mesh(device, (world_size,)); of two dims, ("replicate", "shard"), for hybrid sharding'
)


class AveragedGradients:
    """Looks after the gradients of a module's parameters."""

    def __init__(self, module: nn.Module, groups: SequenceParallelGroups) -> None:
        self._module, self._groups = module, groups
        self._passes = self._steps = 0
        # One that stays even if a wrapper takes all parameters away, and says by whom it was taken.
        self._witness = min(module.parameters(), key=lambda parameter: parameter.numel(), default=None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A copy of the model, such as one of averaged weights, is sharded by the same groups.
        return self

    def attach(self, undo: list[Callable[[], object]]) -> None:
        """Hook the module and all optimizers, adding to ``undo`` what takes the hooks off."""
        undo.append(self._module.register_forward_pre_hook(self._before).remove)
        # Torch's table of hooks outlives the model.
        this = weakref.ref(self)

        def before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
            looking_after = this()
            if looking_after is not None:
                looking_after._before_step(optimizer)

        handle = register_optimizer_step_pre_hook(before_step)
        undo.append(weakref.finalize(self._module, handle.remove))

    @uncompiled
    def _before(self, module: nn.Module, args: object) -> None:
        if not answers(self._groups.sp) or not torch.is_grad_enabled() or self._passes >= CHECKED_PASSES:
            return
        self._passes += 1
        self._refuse_flattened(module)
        found = list(_averaging(module))
        for over in found:
            self._check(over)
        for name, parameter in module.named_parameters():
            mesh = mesh_of(parameter)
            # In and between passes fully_shard may hold it on a part of its mesh.
            if mesh is not None and not any(over.ranks.issuperset(_members(mesh)) for over in found):
                raise UnsupportedError(
                    setting=f"parameter {name}",
                    value="DTensor",
                    why="nobody has tried sequence parallelism of modules whose parameters are sharded by other means "
                    "than fully_shard, such as tensor parallelism",
                    remedy="leave them whole, and give them to fully_shard",
                )

    def _refuse_flattened(self, module: nn.Module) -> None:
        parameters = list(module.parameters())
        flattened = any(getattr(parameter, "_fsdp_flattened", False) for parameter in (*parameters, self._witness))
        if flattened or (self._witness is not None and not parameters):
            raise UnsupportedError(
                setting="module",
                value="FullyShardedDataParallel",
                why="its units put parameters into flat ones, of which nothing says over which ranks their gradients "
                "are averaged",
                remedy="use torch.distributed.fsdp.fully_shard (FSDP2)",
            )

    def _check(self, over: _Averaging) -> None:
        sp, dp = self._groups.sp, self._groups.dp
        missing = sorted({*sp.ranks, *dp.ranks} - over.ranks)
        if missing:
            shares = "of its sequence" if set(missing) & set(sp.ranks) else "that has its part of other sequences"
            raise SequenceParallelConfigError(
                setting=over.setting,
                value=sorted(over.ranks),
                why=f"gradients are averaged over these ranks, without rank {missing[0]} {shares}; of rank "
                f"{sp.ranks[sp.rank]}, which is one of {sp.size} ranks to a sequence, they are exact only in the mean "
                "over all",
                remedy=_WHOLE_WORLD,
            )
        if over.divisor not in (None, len(over.ranks)):
            raise SequenceParallelConfigError(
                setting=f"{over.setting}.set_gradient_divide_factor",
                value=over.divisor,
                why=f"gradients of {len(over.ranks)} ranks, {sp.size} to a sequence, are exact in their mean, not in "
                "another multiple of their sum",
                remedy=f"leave the factor, which is {len(over.ranks)} then, and scale the loss in its place",
            )

    @uncompiled
    def _before_step(self, optimizer: Optimizer) -> None:
        sp = self._groups.sp
        if not answers(sp) or self._steps >= CHECKED_STEPS:
            return
        optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        named = {name: p for name, p in self._module.named_parameters() if id(p) in optimized}
        if not named:
            return
        self._steps += 1
        whole: dict[str, Tensor | None] = {}
        for name, parameter in named.items():
            mesh = mesh_of(parameter)
            if mesh is None:
                whole[name] = parameter.grad
            elif parameter.grad is not None:
                self._check(_Averaging(f"mesh of parameter {name}", _members(mesh)))
        _compare_gradients(whole, sp)


class _Averaging(NamedTuple):
    """Who averages gradients, by what the user sets; over which ranks, and dividing by what, if not by their number."""

    setting: str
    ranks: frozenset[int]
    divisor: float | None = None


def mesh_of(tensor: Tensor) -> Any | None:
    """The device mesh of a DTensor; None of any other."""
    return getattr(tensor, "device_mesh", None)


def _averaging(module: nn.Module) -> Iterator[_Averaging]:
    """All that says over whom it averages, in a pass of the module."""
    # It knows of the module, and not the other way round.
    ddp = DistributedDataParallel._active_ddp_module
    if ddp is not None:
        members = frozenset(dist.get_process_group_ranks(ddp.process_group))
        yield _Averaging("DistributedDataParallel.process_group", members)
    for name, part in module.named_modules():
        state = part._get_fsdp_state() if hasattr(part, "_get_fsdp_state") else None
        for group in _parameter_groups(state):
            divisor = getattr(group, "gradient_divide_factor", None)
            setting = f"fully_shard({name or 'model'}, mesh)"
            yield _Averaging(setting, _members(group.mesh_info.mesh), divisor)


def _parameter_groups(state: Any) -> Iterable[Any]:
    """Of the state of a module that was given to ``fully_shard``. Before torch 2.11 there is one at most."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is not None:
        return groups
    group = getattr(state, "_fsdp_param_group", None)
    return () if group is None else (group,)


def _members(mesh: Any) -> frozenset[int]:
    """The global ranks of a device mesh."""
    return frozenset(mesh.mesh.flatten().tolist())


def _compare_gradients(gradients: dict[str, Tensor | None], sp: Axis) -> None:
    """Collective.

    Raises:
        SequenceParallelConfigError: those of peers differ.
    """
    if not gradients:
        return
    mine = torch.stack([_projection(gradient) for gradient in gradients.values()])
    # By their bits: collectives on the host take integers.
    rows = of_all(mine.flatten().view(torch.int64).tolist(), sp)
    of_ranks = torch.tensor(rows).view(torch.float64).view(sp.size, *mine.shape)
    along, norms = of_ranks.unbind(-1)
    spread = along.amax(0) - along.amin(0) + norms.amax(0) - norms.amin(0)
    largest = norms.amax(0)
    # What is zero but for rounding, such as gradients of the biases of keys, may be rounded in any way.
    apart = (spread > LARGEST_DIFFERENCE * largest) & (largest > SMALLEST_GRADIENT * largest.max())
    off = [name for name, far in zip(gradients, apart.tolist(), strict=True) if far]
    if off:
        raise SequenceParallelConfigError(
            f"the gradients that the optimizer is about to use differ between the ranks {list(sp.ranks)}, which share "
            f"one sequence: those of {len(off)} parameters, such as {', '.join(off[:3])}. Every rank has the gradients "
            f"of its own tokens, {sp.size} times, and nothing has averaged them over these ranks. {_WHOLE_WORLD}; or "
            "average them in the script, over all ranks: dist.all_reduce(parameter.grad, op=dist.ReduceOp.AVG)."
        )


def _projection(gradient: Tensor | None) -> Tensor:
    """Two numbers that tell gradients apart: along some direction, and the norm. Zeros for what is not compared."""
    if gradient is None or gradient.layout is not torch.strided:
        return torch.zeros(2, dtype=torch.float64)
    flat = (torch.view_as_real(gradient) if gradient.is_complex() else gradient).detach().reshape(-1)
    flat = flat[:: max(-(-flat.numel() // SAMPLED_ELEMENTS), 1)].double()
    direction = torch.cos(12.9898 * torch.arange(flat.numel(), dtype=torch.float64, device=flat.device))
    return torch.stack([(flat * direction).sum(), flat.norm()]).cpu()
