"""Hooks that shard an unmodified module: by a plan inside it (DSP, or Ulysses on one dim), or by its batch (Ulysses)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dsp_plugin import loss
from dsp_plugin.batch import BatchSharder
from dsp_plugin.comm.collectives import gather
from dsp_plugin.config import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import Layout, shard_sizes
from dsp_plugin.methods import dsp
from dsp_plugin.plan import Plan, Stage, matching_modules, resolve_plan
from dsp_plugin.planner.stages import Activation, AttentionShape, StagePlan, StageSpec, plan_stages
from dsp_plugin.routing import AttentionRoute


class Parallelized:
    """Hooks in place on a module. `remove` takes them off; `stage_plan` is the plan of the last forward pass, if any."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._region: _Region | None = None

    @property
    def stage_plan(self) -> StagePlan | None:
        """Which dim was sharded where, with bytes; None before the first forward pass and for batch sharding."""
        return self._region.stage_plan if self._region is not None else None

    def remove(self) -> None:
        """Leave the module as it was."""
        while self._undo:
            self._undo.pop()()


def parallelize(
    module: nn.Module,
    plan: Plan | None = None,
    *,
    config: SequenceParallelConfig,
    groups: SequenceParallelGroups,
) -> Parallelized:
    """Shard the sequence of ``module`` by hooks; its code and its callers stay as they are.

    With ``config.batch`` the named forward arguments are sharded before the module runs. Otherwise a plan says where
    inside the module tokens are split, switched and gathered, and callers see whole tensors.

    Parameter gradients come out such that their mean over the sequence ranks is exact.

    Args:
        plan: for ``module``; ``config.plan``, or the one known for the model, when None.

    Raises:
        SequenceParallelConfigError: the model does not fit the config or the plan.
    """
    handle = Parallelized()
    if config.batch:
        _shard_batch(module, config, groups, handle)
    else:
        root, plan = (module, plan) if plan is not None else resolve_plan(module, config.plan)
        handle._region = _Region(root, plan, config, groups)
        handle._undo.extend(handle._region.install())
    return handle


def _shard_batch(
    module: nn.Module, config: SequenceParallelConfig, groups: SequenceParallelGroups, handle: Parallelized
) -> None:
    sharder = BatchSharder(module, config, groups.sp)
    current: dict[str, Any] = {"layout": None, "count": None}

    def before(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        args, kwargs, current["layout"], current["count"] = sharder.shard(args, kwargs)
        return args, kwargs

    def after(_: nn.Module, args: tuple, output: Any) -> Any:
        first, rebuild = _first_tensor(output)
        if config.loss is not None:
            return rebuild(_global_loss(first, current["count"], groups))
        dim = config.gather_output
        assert dim is not None
        return rebuild(gather(first, dim, current["layout"], axis=groups.sp, method=config.method))

    handle._undo.append(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    handle._undo.append(module.register_forward_hook(after).remove)
    for pattern in config.attention:
        for name, part in matching_modules(module, pattern, "attention").items():
            route = AttentionRoute(name, config.method, config.kernel, groups, lambda: current["layout"])
            handle._undo.append(route.install(part))


def _global_loss(local_mean: Tensor, count: Tensor, groups: SequenceParallelGroups) -> Tensor:
    if local_mean.numel() != 1:
        raise SequenceParallelConfigError(
            setting="loss",
            why=f"forward returned a tensor {tuple(local_mean.shape)} where the config promises a scalar mean loss",
            remedy='return the mean loss, or set "gather_output" and compute the loss outside',
        )
    # The mean over a shard of no tokens is NaN, and NaN times a count of 0 too.
    local_sum = torch.where(count > 0, local_mean * count, torch.zeros_like(local_mean))
    return loss.contract(local_sum.reshape(()), count, groups.sp).reshape(local_mean.shape)


def _first_tensor(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor that an output leads with (itself, ``.loss``, or item 0), and how to put another in its place."""
    if isinstance(output, Tensor):
        return output, lambda tensor: tensor
    if isinstance(output, dict):
        key = "loss" if "loss" in output else next(iter(output))

        def in_dict(tensor: Tensor) -> Any:
            output[key] = tensor
            return output

        return output[key], in_dict
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0], lambda tensor: type(output)((tensor, *output[1:]))
    raise SequenceParallelConfigError(
        setting="model output",
        value=type(output).__name__,
        why="expected a tensor, a dict or a tuple that leads with one",
        remedy="return the tensor to be contracted or gathered first",
    )


@dataclass(frozen=True)
class _Placed:
    """One stage in model order."""

    name: str
    module: nn.Module
    stage: Stage


class _Region:
    """The stretch of a model between the first stage and the last, where tokens are sharded."""

    def __init__(
        self, root: nn.Module, plan: Plan, config: SequenceParallelConfig, groups: SequenceParallelGroups
    ) -> None:
        self._plan, self._config, self._groups = plan, config, groups
        self._dims = plan.tokens.split()
        self._placed = _place(root, plan)
        self._sizes: dict[str, int] = {}
        self._plans: dict[tuple[int, ...], StagePlan] = {}
        self.stage_plan: StagePlan | None = None

    def install(self) -> list[Callable[[], None]]:
        undo: list[Callable[[], None]] = []
        for index, placed in enumerate(self._placed):
            undo.append(placed.module.register_forward_pre_hook(self._before(index), with_kwargs=True).remove)
            if placed.stage.attention is not None:
                parts = matching_modules(placed.module, placed.stage.attention, f"plan attention of {placed.name}")
                for name, part in parts.items():
                    route = AttentionRoute(
                        f"{placed.name}.{name}", "ulysses", self._config.kernel, self._groups, self._layout_of(index)
                    )
                    undo.append(route.install(part))
        undo.append(self._placed[-1].module.register_forward_hook(self._after_last).remove)
        return undo

    def _before(self, index: int) -> Callable[..., tuple[tuple, dict[str, Any]]]:
        placed = self._placed[index]

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            arguments = _Arguments(placed, args, kwargs)
            x = arguments.get(placed.stage.tokens)
            if index == 0:
                self._enter(x)
            assert self.stage_plan is not None, f"{placed.name} ran before {self._placed[0].name}"
            sharded = self.stage_plan.rows[index].sharded
            arguments.set(placed.stage.tokens, self._move(x, index, sharded))
            for argument, pattern in placed.stage.follows.items():
                value = arguments.get(argument)
                if value is not None and sharded in pattern.split():
                    arguments.set(argument, self._own_part(value, pattern.split().index(sharded), sharded))
            return arguments.args, arguments.kwargs

        return hook

    def _enter(self, x: Tensor) -> None:
        """Take the sizes of whole tokens, and the plan for them: the same on every rank."""
        if x.dim() != len(self._dims):
            raise SequenceParallelConfigError(
                setting="plan.tokens",
                value=self._plan.tokens,
                why=f"names {len(self._dims)} dims, but {self._placed[0].name} was given tokens {tuple(x.shape)}",
                remedy="name every dim of the activation in memory order",
            )
        self._sizes = dict(zip(self._dims, x.shape, strict=True))
        key = (*x.shape, x.element_size())
        if key not in self._plans:
            features = x.shape[-1]
            activation = Activation(
                {dim: self._sizes[dim] for dim in self._dims[:-1]}, features, x.element_size(), self._plan.batch_dim
            )
            specs = [_spec(placed, features) for placed in self._placed]
            switching = self._config.method == "dsp"
            self._plans[key] = plan_stages(activation, specs, self._groups.sp.size, switching=switching)
        self.stage_plan = self._plans[key]

    def _move(self, x: Tensor, index: int, sharded: str) -> Tensor:
        """Bring the tokens to where this stage has them sharded."""
        assert self.stage_plan is not None
        to_dim = self._dims.index(sharded)
        if index == 0:
            return dsp.split(x, to_dim, groups=self._groups)
        before = self.stage_plan.rows[index - 1].sharded
        if before == sharded:
            return x
        return dsp.switch(x, self._dims.index(before), to_dim, length=self._sizes[before], groups=self._groups)

    def _after_last(self, module: nn.Module, args: tuple, output: Any) -> Any:
        assert self.stage_plan is not None
        sharded = self.stage_plan.rows[-1].sharded
        x, rebuild = _first_tensor(output)
        dim = self._dims.index(sharded)
        return rebuild(dsp.gather(x, dim, length=self._sizes[sharded], groups=self._groups))

    def _own_part(self, value: Tensor, dim: int, sharded: str) -> Tensor:
        layout = Layout("contiguous", self._sizes[sharded], self._groups.sp.size)
        return layout.shard(value, dim, self._groups.sp.rank)

    def _layout_of(self, index: int) -> Callable[[], Layout | None]:
        stage = self._placed[index].stage

        def layout_now() -> Layout | None:
            assert self.stage_plan is not None
            row = self.stage_plan.rows[index]
            if row.inside == "local":
                return None
            length, size = self._sizes[row.sharded], self._groups.sp.size
            if len(stage.computes_along) == 1:
                return Layout("contiguous", length, size)
            others = prod(self._sizes[dim] for dim in stage.computes_along if dim != row.sharded)
            return Layout.of_sizes([others * local for local in shard_sizes(length, size)])

        return layout_now


class _Arguments:
    """A call's arguments, by the position or the name that a plan uses."""

    def __init__(self, placed: _Placed, args: tuple, kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self._names = _parameter_names(placed.module)
        self._stage = placed.name

    def get(self, argument: int | str) -> Any:
        place = self._place(argument)
        if isinstance(place, int):
            return self.args[place]
        return self.kwargs.get(place)

    def set(self, argument: int | str, value: Any) -> None:
        place = self._place(argument)
        if isinstance(place, int):
            self.args = (*self.args[:place], value, *self.args[place + 1 :])
        else:
            self.kwargs = {**self.kwargs, place: value}

    def _place(self, argument: int | str) -> int | str:
        position = argument if isinstance(argument, int) else self._position_of(argument)
        if position < len(self.args):
            return position
        return argument if isinstance(argument, str) else self._names[argument]

    def _position_of(self, name: str) -> int:
        if name not in self._names:
            raise SequenceParallelConfigError(
                setting=f"plan of {self._stage}",
                value=name,
                why=f"its forward has no such argument; it takes {', '.join(self._names)}",
                remedy="name its arguments in tokens and follows",
            )
        return self._names.index(name)


def _parameter_names(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _place(root: nn.Module, plan: Plan) -> list[_Placed]:
    order = {name: index for index, (name, _) in enumerate(root.named_modules())}
    placed = [
        _Placed(name, module, stage)
        for stage in plan.stages
        for name, module in matching_modules(root, stage.modules, "plan stage").items()
    ]
    return sorted(placed, key=lambda item: order[item.name])


def _spec(placed: _Placed, features: int) -> StageSpec:
    stage = placed.stage
    shape = None
    if stage.attention is not None:
        if stage.heads is None:
            raise SequenceParallelConfigError(
                setting=f"plan stage {stage.modules!r} heads",
                why=f"attention={stage.attention!r} is given without its number of heads",
                remedy="add heads=..., so that the planner can price Ulysses inside the stage",
            )
        shape = AttentionShape(stage.heads, stage.kv_heads or stage.heads, features // stage.heads)
    return StageSpec(placed.name, stage.computes_along, shape)
