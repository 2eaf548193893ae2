"""The plan route: tokens are sharded between a model's first stage and its last, on dims that the planner chose."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from dsp_plugin.comm import meter
from dsp_plugin.config.attention import attention_of
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import Layout, shard_sizes
from dsp_plugin.planner.stages import StagePlan, StageRow
from dsp_plugin.plans.pattern import Pattern, parse
from dsp_plugin.plans.plan import Plan, matching_modules, outermost
from dsp_plugin.sharding.arguments import Arguments
from dsp_plugin.sharding.attributes import RegionAttributes
from dsp_plugin.sharding.outputs import first_tensor, only_tensor, when_backward_starts
from dsp_plugin.sharding.passes import PassSizes, border_module, inside_of, planned, sizes_of_inputs
from dsp_plugin.sharding.placed import placed_stages
from dsp_plugin.sharding.random_layers import RandomLayer, check_random_layers, random_layers
from dsp_plugin.sharding.routing import AttentionRoute
from dsp_plugin.sharding.token_moves import Place, TokenMoves
from dsp_plugin.sharding.wrappers import uncompiled, unwrapped
from dsp_plugin.training.randomness import RegionSeed, RegionVisit


class _Planned(NamedTuple):
    """What passes of the same sizes have in common."""

    stage_plan: StagePlan
    rows: dict[int, StageRow]
    layers: list[RandomLayer]


@dataclass(frozen=True)
class _Pass:
    """One forward pass: the stages that run in it, the sizes of its dims, where they are sharded, and its seeds."""

    sizes: dict[str, int]
    stage_plan: StagePlan
    rows: dict[int, StageRow]
    moves: TokenMoves
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
        self._placed = placed_stages(root, plan)
        self._root = root
        self._border = border_module(root, plan)
        self._attributes = RegionAttributes(root, plan)
        self._plans: dict[PassSizes, _Planned] = {}
        self._running = list(range(len(self._placed)))
        self._known = dict(plan.sizes)
        self._last_run: int | None = None
        self._pass: _Pass | None = None
        self._visit: RegionVisit | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A copy of the model, such as one of averaged weights, is sharded by the same groups.
        return self

    @property
    def serves_attention(self) -> bool:
        """Whether some stage's attention is computed by a method."""
        return any(stage.attention is not None for stage in self._plan.stages)

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
        undo.append(self._attributes.restore)
        undo.append(self._root.register_forward_pre_hook(self._before_all, with_kwargs=True).remove)
        if self._border is not None:
            undo.append(self._border.register_forward_pre_hook(self._before_region, with_kwargs=True).remove)
        for index, placed in enumerate(self._placed):
            undo.append(placed.module.register_forward_pre_hook(self._before(index), with_kwargs=True).remove)
            if placed.stage.attention is not None:
                self._route(index, undo)
            undo.append(placed.module.register_forward_hook(self._after(index)).remove)
        if self._border is not None:
            undo.append(self._border.register_forward_hook(self._after_region).remove)
        undo.append(self._root.register_forward_hook(self._after_all).remove)
        undo.append(self._root.register_forward_hook(self._clean_up, always_call=True).remove)

    def _route(self, index: int, undo: list[Callable[[], None]]) -> None:
        placed = self._placed[index]
        assert placed.stage.attention is not None
        parts = matching_modules(placed.module, placed.stage.attention, f"plan attention of {placed.name}")
        for name, part in outermost(parts).items():
            route = AttentionRoute(
                f"{placed.name}.{name}",
                attention_of(self._config, inside_of(self._config).method),
                self._groups,
                self._layout_of(index),
                lambda: self._now.seed,
            )
            undo.append(route.install(unwrapped(part)))

    @uncompiled
    def _before_all(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if _recomputing():
            return
        self._attributes.restore()
        self._attributes.bind(module)
        self._last_run = None
        arguments = Arguments(type(module).__name__, module, args, kwargs)
        self._running = [index for index, placed in enumerate(self._placed) if arguments.hold(placed.stage.when)]
        if not self._running:
            conditions = {getattr(placed.stage.when, "__name__", str(placed.stage.when)) for placed in self._placed}
            raise SequenceParallelConfigError(
                setting="plan.stages",
                why=f"none runs in this forward pass: {', '.join(sorted(conditions))} are false",
                remedy="keep a stage without a condition",
            )
        self._known = sizes_of_inputs(self._plan, arguments)

    @uncompiled
    def _before_region(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if _recomputing():
            return None
        assert self._plan.region is not None
        region = self._plan.region
        arguments = Arguments(region.module, module, args, kwargs)
        x, pattern = arguments.tokens(region.tokens), parse(region.layout or self._plan.tokens)
        self._enter(x, pattern, module.training)
        first = self._now.stage_plan.rows[0]
        place = self._home() or self._place(self._running[0], first)
        arguments.set(region.tokens, self._now.moves.move(x, pattern, None, place, f"plan.region {region.module}"))
        self._attributes.override()
        self._cut_buffers(place)
        return arguments.args, arguments.kwargs

    @uncompiled
    def _after_region(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if _recomputing():
            return None
        assert self._plan.region is not None
        self._leave()
        self._attributes.restore()
        region, place = self._plan.region, self._leaves_at(self._running[-1])
        x, rebuild = only_tensor(output, region.module)
        pattern = parse(region.leaves or region.layout or self._plan.tokens)
        return rebuild(self._now.moves.move(x, pattern, place, None, f"plan.region {region.module} leaves"))

    def _before(self, index: int) -> Callable[..., tuple[tuple, dict[str, Any]] | None]:
        placed = self._placed[index]
        pattern = self._plan.layout_taken(placed.stage)
        setting = f"plan layout of {placed.name}"

        @uncompiled
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if self._is_outside(index):
                return None
            arguments = Arguments(placed.name, placed.module, args, kwargs)
            self._check_order(index)
            x = arguments.tokens(placed.stage.tokens)
            if self._border is None and index == self._running[0]:
                self._enter(x, pattern, module.training)
                if not _recomputing():
                    self._attributes.override()
            place = self._place(index, self._now.rows[index])
            arguments.set(placed.stage.tokens, self._now.moves.move(x, pattern, self._found_at(index), place, setting))
            for argument, text in placed.stage.follows.items():
                value = arguments.get(argument)
                if value is not None:
                    setting_of = f"plan follows of {placed.name}, {argument!r}"
                    arguments.set(argument, self._own_part(value, text, place, setting_of))
            return arguments.args, arguments.kwargs

        return hook

    def _after(self, index: int) -> Callable[..., Any]:
        placed = self._placed[index]
        pattern = self._plan.layout_given(placed.stage)

        @uncompiled
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if self._is_outside(index):
                return None
            last = index == self._running[-1] and self._border is None
            target = None if last else self._leaves_at(index)
            if last and not _recomputing():
                self._leave()
                self._attributes.restore()
            elif target is not None:
                self._cut_buffers(target)
            here = self._place(index, self._now.rows[index])
            if target == here:
                return None
            x, rebuild = first_tensor(output)
            return rebuild(self._now.moves.move(x, pattern, here, target, f"plan layout of {placed.name}"))

        return hook

    def _is_outside(self, index: int) -> bool:
        """Whether a stage is left out of this pass, and called all the same where tokens are whole."""
        whole = self._border is None and self._last_run in (None, self._running[-1])
        return index not in self._running and (whole or _recomputing())

    def _home(self) -> Place | None:
        """Where tokens have to be outside of stages."""
        return None if self._plan.between is None else Place(self._plan.between)

    def _place(self, index: int, row: StageRow) -> Place:
        """Where the tokens are while a stage runs."""
        return Place(row.sharded, padded=row.inside == "local")

    def _found_at(self, index: int) -> Place | None:
        """Where the tokens are when they reach a stage."""
        at = self._running.index(index)
        if at == 0 and self._border is None:
            return None
        if self._home() is not None or at > 0:
            return self._home() or self._place(self._running[at - 1], self._now.rows[self._running[at - 1]])
        return self._place(index, self._now.rows[index])

    def _leaves_at(self, index: int) -> Place | None:
        """Where the tokens are behind a stage; None behind the last, if they are whole there."""
        if index == self._running[-1] and self._border is None:
            return None
        return self._home() or self._place(index, self._now.rows[index])

    def _cut_buffers(self, place: Place) -> None:
        self._attributes.cut(lambda value, text, setting: self._own_part(value, text, place, setting))

    def _check_order(self, index: int) -> None:
        if _recomputing():
            return  # In whatever order the backward pass needs.
        at = -1 if self._last_run is None else self._running.index(self._last_run)
        expected = self._running[at + 1] if at + 1 < len(self._running) else None
        # A pass may begin anew where the last one was of a part that was called by itself, behind the root's back.
        if index not in (self._running[0], expected):
            names = [placed.name for placed in self._placed]
            raise SequenceParallelConfigError(
                setting="plan.stages",
                value=names[index],
                why=f"it ran where {names[expected] if expected is not None else 'no further stage'} was due; stages "
                f"must run once each, in the order of plan.order={self._plan.order!r}",
                remedy='set order to "layers" if forward runs the stages of one layer after the other; else register '
                "the modules in the order in which forward runs them, one for each run",
            )
        self._last_run = index

    @uncompiled
    def _after_all(self, module: nn.Module, args: tuple, output: Any) -> None:
        if _recomputing():
            return
        last, self._last_run = self._last_run, None
        if last is None:
            return
        if last != self._running[-1]:
            missing = self._running[self._running.index(last) + 1]
            raise SequenceParallelConfigError(
                setting="plan.stages",
                value=self._placed[missing].name,
                why="forward ended without it, so the tokens were never made whole again",
                remedy='plan only modules that every forward pass runs, or name the argument that skips them as "when"',
            )
        # Not at the last stage's output: inside a reentrant checkpoint that has no gradient yet.
        with suppress(SequenceParallelConfigError):
            leading, _ = first_tensor(output)
            when_backward_starts(leading, partial(self._recall, self._now, module))

    @uncompiled
    def _clean_up(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Also when forward raised."""
        if not _recomputing():
            self._leave()
            self._attributes.restore()
            self._last_run = None
            # A part of the root may be called by itself: its sizes are not those of the last call of the root.
            self._known = dict(self._plan.sizes)

    def _enter(self, x: Tensor, pattern: Pattern, training: bool) -> None:
        """Take the sizes of whole tokens, and the plan for them: the same on every rank."""
        if _recomputing():
            if self._now.seed is not None:
                self._now.seed.apply()
            return
        sizes = pattern.solve(x.shape, self._known, f"tokens of {self._placed[self._running[0]].name}")
        key = PassSizes(
            tuple(sorted(sizes.items())),
            tuple(self._running),
            tuple(x.shape),
            x.element_size(),
            x.requires_grad,
        )
        if key not in self._plans:
            running = [self._placed[index] for index in self._running]
            stage_plan = planned(self._plan, self._config, self._groups.sp.size, running, key)
            rows = dict(zip(self._running, stage_plan.rows, strict=True))
            layers = random_layers(self._root, self._plan, self._placed, rows)
            self._plans[key] = _Planned(stage_plan, rows, layers)
        stage_plan, rows, layers = self._plans[key]
        self._leave()
        if training and self._groups.sp.size > 1:
            check_random_layers(layers)
            self._visit = RegionVisit(self._groups.sp)
        if torch.is_grad_enabled():
            meter.count(tokens=prod(sizes[dim] for dim in self._plan.dims))
        seed = self._visit.seed if self._visit is not None else None
        self._pass = _Pass(sizes, stage_plan, rows, TokenMoves(sizes, self._groups), seed)

    def _leave(self) -> None:
        visit, self._visit = self._visit, None
        if visit is not None:
            visit.leave()

    def _recall(self, earlier: _Pass, root: nn.Module) -> None:
        self._pass, self._running = earlier, list(earlier.rows)
        if self._plan.overrides:
            # What is recomputed in this backward pass needs them too.
            self._attributes.bind(root)
            self._attributes.override()
            torch.autograd.Variable._execution_engine.queue_callback(self._attributes.restore)

    def _own_part(self, value: Any, text: str, place: Place, setting: str) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(self._own_part(part, text, place, setting) for part in value)
        if not isinstance(value, Tensor):
            raise SequenceParallelConfigError(
                setting=setting,
                value=text,
                why=f"it is a {type(value).__name__}, not a tensor",
                remedy="name tensors, or tuples of tensors",
            )
        return self._now.moves.cut(value, text, place, setting)

    def _layout_of(self, index: int) -> Callable[[], Layout | None]:
        stage = self._placed[index].stage

        def layout_now() -> Layout | None:
            row, sizes = self._now.rows[index], self._now.sizes
            if row.inside == "local":
                return None
            length, size = sizes[row.sharded], self._groups.sp.size
            if len(stage.computes_along) == 1:
                return Layout("contiguous", length, size)
            others = prod(sizes[dim] for dim in stage.computes_along if dim != row.sharded)
            return Layout.of_sizes([others * local for local in shard_sizes(length, size)])

        return layout_now


def _recomputing() -> bool:
    """Whether a backward pass is running: what runs then is a checkpointed stretch, again."""
    return bool(torch._C._current_graph_task_id() != -1)
