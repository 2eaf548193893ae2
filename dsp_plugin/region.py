"""The plan route: tokens are sharded between a model's first stage and its last, on dims that the planner chose."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dsp_plugin.comm import meter
from dsp_plugin.config import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import Layout, shard_sizes
from dsp_plugin.methods import attention_of, dsp
from dsp_plugin.outputs import first_tensor, when_backward_starts
from dsp_plugin.plan import Plan, Stage, matching_modules, outermost
from dsp_plugin.planner.stages import Activation, AttentionShape, StagePlan, StageSpec, plan_stages
from dsp_plugin.randomness import RegionSeed, RegionVisit
from dsp_plugin.routing import AttentionRoute


@dataclass(frozen=True)
class _Placed:
    """One stage in model order."""

    name: str
    module: nn.Module
    stage: Stage


@dataclass(frozen=True)
class _Pass:
    """One forward pass: the sizes of its dims, where they are sharded, and its seeds while training."""

    sizes: dict[str, int]
    stage_plan: StagePlan
    seed: RegionSeed | None


class ShardedRegion:
    """The stretch of a model between the first stage and the last, where tokens are sharded.

    Raises:
        SequenceParallelConfigError: the plan does not fit the model.
    """

    def __init__(
        self, root: nn.Module, plan: Plan, config: SequenceParallelConfig, groups: SequenceParallelGroups
    ) -> None:
        self._plan, self._config, self._groups = plan, config, groups
        self._dims = plan.tokens.split()
        self._placed = _place(root, plan)
        self._root = root
        self._plans: dict[tuple[int, ...], StagePlan] = {}
        self._last_run: int | None = None
        self._pass: _Pass | None = None
        self._visit: RegionVisit | None = None

    @property
    def stage_plan(self) -> StagePlan | None:
        """The plan of the running forward pass, or the last; None before the first."""
        return self._pass.stage_plan if self._pass is not None else None

    @property
    def _now(self) -> _Pass:
        assert self._pass is not None
        return self._pass

    def install(self, undo: list[Callable[[], None]]) -> None:
        """Hook the stages, adding to ``undo`` what takes each hook off."""
        for index, placed in enumerate(self._placed):
            undo.append(placed.module.register_forward_pre_hook(self._before(index), with_kwargs=True).remove)
            if placed.stage.attention is not None:
                parts = matching_modules(placed.module, placed.stage.attention, f"plan attention of {placed.name}")
                for name, part in outermost(parts).items():
                    route = AttentionRoute(
                        f"{placed.name}.{name}",
                        attention_of(self._config, "ulysses"),
                        self._groups,
                        self._layout_of(index),
                        lambda: self._now.seed,
                    )
                    undo.append(route.install(part))
        undo.append(self._placed[-1].module.register_forward_hook(self._after_last).remove)
        undo.append(self._root.register_forward_hook(self._after_all).remove)

    def _before(self, index: int) -> Callable[..., tuple[tuple, dict[str, Any]]]:
        placed = self._placed[index]

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            self._check_order(index)
            arguments = _Arguments(placed, args, kwargs)
            x = arguments.tokens()
            if index == 0:
                self._enter(x, module.training)
            sharded = self._now.stage_plan.rows[index].sharded
            arguments.set(placed.stage.tokens, self._move(x, index, sharded))
            for argument, pattern in placed.stage.follows.items():
                value = arguments.get(argument)
                if value is not None and sharded in pattern.split():
                    arguments.set(argument, self._own_part(placed, argument, value, pattern, sharded))
            return arguments.args, arguments.kwargs

        return hook

    def _check_order(self, index: int) -> None:
        if _recomputing():
            return  # In whatever order the backward pass needs.
        expected = 0 if self._last_run is None else self._last_run + 1
        if index not in (0, expected):
            names = [placed.name for placed in self._placed]
            raise SequenceParallelConfigError(
                setting="plan.stages",
                value=names[index],
                why=f"it ran where {names[expected] if expected < len(names) else 'no further stage'} was due; stages "
                f"must run once each, in the order of the model's modules",
                remedy="register the modules in the order in which forward runs them, one for each run",
            )
        self._last_run = index

    def _after_all(self, module: nn.Module, args: tuple, output: Any) -> None:
        if _recomputing():
            return
        last, self._last_run = self._last_run, None
        if last is None:
            return
        if last + 1 != len(self._placed):
            raise SequenceParallelConfigError(
                setting="plan.stages",
                value=self._placed[last + 1].name,
                why="forward ended without it, so the tokens were never made whole again",
                remedy="plan only modules that every forward pass runs",
            )
        # Not at the last stage's output: inside a reentrant checkpoint that has no gradient yet.
        with suppress(SequenceParallelConfigError):
            leading, _ = first_tensor(output)
            when_backward_starts(leading, partial(self._recall, self._now))

    def _enter(self, x: Tensor, training: bool) -> None:
        """Take the sizes of whole tokens, and the plan for them: the same on every rank."""
        if _recomputing():
            if self._now.seed is not None:
                self._now.seed.apply()
            return
        if x.dim() != len(self._dims):
            raise SequenceParallelConfigError(
                setting="plan.tokens",
                value=self._plan.tokens,
                why=f"names {len(self._dims)} dims, but {self._placed[0].name} was given tokens {tuple(x.shape)}",
                remedy="name every dim of the activation in memory order",
            )
        sizes = dict(zip(self._dims, x.shape, strict=True))
        key = (*x.shape, x.element_size())
        if key not in self._plans:
            features = x.shape[-1]
            activation = Activation(
                {dim: sizes[dim] for dim in self._dims[:-1]}, features, x.element_size(), self._plan.batch_dim
            )
            specs = [_spec(placed, features) for placed in self._placed]
            switching = self._config.method == "dsp"
            self._plans[key] = plan_stages(activation, specs, self._groups.sp.size, switching=switching)
        self._leave()
        if training and self._groups.sp.size > 1:
            self._visit = RegionVisit(self._groups.sp)
        if torch.is_grad_enabled():
            meter.count(tokens=prod(x.shape[:-1]))
        self._pass = _Pass(sizes, self._plans[key], self._visit.seed if self._visit is not None else None)

    def _leave(self) -> None:
        visit, self._visit = self._visit, None
        if visit is not None:
            visit.leave()

    def _move(self, x: Tensor, index: int, sharded: str) -> Tensor:
        """Bring the tokens to where this stage has them sharded."""
        to_dim = self._dims.index(sharded)
        if index == 0:
            return dsp.split(x, to_dim, groups=self._groups)
        before = self._now.stage_plan.rows[index - 1].sharded
        if before == sharded:
            return x
        return dsp.switch(x, self._dims.index(before), to_dim, length=self._now.sizes[before], groups=self._groups)

    def _after_last(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if not _recomputing():
            self._leave()
        sharded = self._now.stage_plan.rows[-1].sharded
        x, rebuild = first_tensor(output)
        dim = self._dims.index(sharded)
        return rebuild(dsp.gather(x, dim, length=self._now.sizes[sharded], groups=self._groups))

    def _recall(self, earlier: _Pass) -> None:
        self._pass = earlier

    def _own_part(self, placed: _Placed, argument: int | str, value: Any, pattern: str, sharded: str) -> Tensor:
        names, length = pattern.split(), self._now.sizes[sharded]
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        if len(shape) != len(names) or shape[names.index(sharded)] != length:
            raise SequenceParallelConfigError(
                setting=f"plan follows of {placed.name}",
                value={argument: pattern},
                why=f"its forward was given {shape or type(value).__name__} where {sharded} has {length} entries",
                remedy="name every dim of the argument, and pass it whole",
            )
        layout = Layout("contiguous", length, self._groups.sp.size)
        return layout.shard(value, names.index(sharded), self._groups.sp.rank)

    def _layout_of(self, index: int) -> Callable[[], Layout | None]:
        stage = self._placed[index].stage

        def layout_now() -> Layout | None:
            row, sizes = self._now.stage_plan.rows[index], self._now.sizes
            if row.inside == "local":
                return None
            length, size = sizes[row.sharded], self._groups.sp.size
            if len(stage.computes_along) == 1:
                return Layout("contiguous", length, size)
            others = prod(sizes[dim] for dim in stage.computes_along if dim != row.sharded)
            return Layout.of_sizes([others * local for local in shard_sizes(length, size)])

        return layout_now


class _Arguments:
    """A call's arguments, by the position or the name that a plan uses."""

    def __init__(self, placed: _Placed, args: tuple, kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self._names = _parameter_names(placed.module)
        self._name, self._stage = placed.name, placed.stage

    def tokens(self) -> Tensor:
        """The tokens of the stage."""
        argument = self._stage.tokens
        x = self.get(argument)
        if not isinstance(x, Tensor):
            raise SequenceParallelConfigError(
                setting=f"plan tokens of {self._name}",
                value=argument,
                why=f"its forward was given {type(x).__name__} there, not a tensor",
                remedy=f"name the argument with the tokens, one of {', '.join(self._names)}",
            )
        return x

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
        known = argument < len(self._names) if isinstance(argument, int) else argument in self._names
        if not known:
            raise SequenceParallelConfigError(
                setting=f"plan of {self._name}",
                value=argument,
                why=f"its forward has no such argument; it takes {', '.join(self._names)}",
                remedy="name its arguments in tokens and follows",
            )
        position = argument if isinstance(argument, int) else self._names.index(argument)
        return position if position < len(self.args) else self._names[position]


def _recomputing() -> bool:
    """Whether a backward pass is running: what runs then is a checkpointed stretch, again."""
    return bool(torch._C._current_graph_task_id() != -1)


def _parameter_names(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _place(root: nn.Module, plan: Plan) -> list[_Placed]:
    order = {name: index for index, (name, _) in enumerate(root.named_modules())}
    placed = [
        _Placed(name, module, stage)
        for stage in plan.stages
        for name, module in matching_modules(root, stage.modules, "plan stage").items()
    ]
    placed.sort(key=lambda item: order[item.name])
    for before, after in itertools.pairwise(placed):
        if f"{after.name}.".startswith(f"{before.name}."):
            raise SequenceParallelConfigError(
                setting="plan.stages",
                value=after.name,
                why=f"is matched by stage {after.stage.modules!r}, and is (in) {before.name}, matched by stage "
                f"{before.stage.modules!r}",
                remedy="match every module by one stage, and no module inside another stage",
            )
    return placed


def _spec(placed: _Placed, features: int) -> StageSpec:
    stage = placed.stage
    shape = None
    if stage.attention is not None:
        assert stage.heads is not None
        shape = AttentionShape(stage.heads, stage.kv_heads or stage.heads, features // stage.heads)
    return StageSpec(placed.name, stage.computes_along, shape)
