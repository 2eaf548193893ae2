"""The plan route: tokens are sharded between a model's first stage and its last, on dims that the planner chose."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from dsp_plugin.comm import meter
from dsp_plugin.comm.consent import go_on
from dsp_plugin.config.attention import attention_of
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.derivatives import refuse_transforms
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import Layout
from dsp_plugin.patches.recompute import enter_again
from dsp_plugin.planner.stages import StagePlan, StageRow
from dsp_plugin.plans.pattern import Pattern, parse
from dsp_plugin.plans.plan import Plan, matching_modules, outermost
from dsp_plugin.sharding.arguments import Arguments
from dsp_plugin.sharding.attributes import RegionAttributes
from dsp_plugin.sharding.compiling import uncompiled
from dsp_plugin.sharding.outputs import all_tensors, first_tensor, only_tensor
from dsp_plugin.sharding.passes import (
    Entered,
    PassSizes,
    Planned,
    RegionPass,
    border_module,
    inside_of,
    layout_inside,
    left_out,
    out_of_order,
    planned,
    sizes_of_inputs,
)
from dsp_plugin.sharding.placed import placed_stages
from dsp_plugin.sharding.random_layers import check_random_layers, random_layers
from dsp_plugin.sharding.routing import AttentionRoute
from dsp_plugin.sharding.stages_alone import StagesAlone
from dsp_plugin.sharding.token_moves import Place, TokenMoves
from dsp_plugin.sharding.wrappers import ended_with, unwrapped
from dsp_plugin.training.extents import Running
from dsp_plugin.training.randomness import RegionVisit


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
        self._plans: dict[PassSizes, Planned] = {}
        # Kinds of passes in which all ranks came through all stages.
        self._finished: set[PassSizes] = set()
        self._passes: Running[RegionPass] = Running(self._overridden)
        self._alone = StagesAlone(self._passes, plan, len(self._placed))
        self._stage_plan: StagePlan | None = None

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
        return self._stage_plan

    @property
    def _again(self) -> bool:
        """Whether a part of the pass is run again: nothing is decided then, and stages come in any order."""
        return self._passes.again

    @property
    def _now(self) -> RegionPass:
        state = self._passes.now
        assert state is not None
        return state

    @property
    def _entered(self) -> Entered:
        assert self._now.entered is not None
        return self._now.entered

    def install(self, undo: list[Callable[[], object]]) -> None:
        """Hook the stages, adding to ``undo`` what takes each hook off."""
        undo.append(enter_again())
        undo.append(self._attributes.restore)
        undo.append(self._passes.close)
        undo.append(self._root.register_forward_pre_hook(self._before_all, with_kwargs=True).remove)
        if self._border is not None:
            undo.append(self._border.register_forward_pre_hook(self._before_region, with_kwargs=True).remove)
        for index, placed in enumerate(self._placed):
            undo.append(placed.module.register_forward_pre_hook(self._before(index), with_kwargs=True).remove)
            if placed.stage.attention is not None:
                self._route(index, undo)
            undo.append(placed.module.register_forward_hook(self._after(index)).remove)
            if self._border is None:
                undo.append(ended_with(placed.module, self._passes, self._clean_up))
        if self._border is not None:
            undo.append(self._border.register_forward_hook(self._after_region).remove)
        undo.append(self._root.register_forward_hook(self._after_all).remove)
        undo.append(self._root.register_forward_hook(self._end, always_call=True).remove)
        undo.append(ended_with(self._root, self._passes, self._clean_up))

    def _route(self, index: int, undo: list[Callable[[], object]]) -> None:
        placed = self._placed[index]
        assert placed.stage.attention is not None
        parts = matching_modules(placed.module, placed.stage.attention, f"plan attention of {placed.name}")
        for name, part in outermost(parts).items():
            route = AttentionRoute(
                f"{placed.name}.{name}",
                attention_of(self._config, inside_of(self._config).method),
                self._groups,
                self._layout_of(index),
                lambda: self._entered.seed,
            )
            undo.append(route.install(unwrapped(part)))

    @uncompiled
    def _before_all(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._passes.begin(state := RegionPass(list(range(len(self._placed))), dict(self._plan.sizes), module))
        self._attributes.restore()
        self._attributes.bind(module)
        arguments = Arguments(type(module).__name__, module, args, kwargs)
        state.running = [index for index, placed in enumerate(self._placed) if arguments.hold(placed.stage.when)]
        if not state.running:
            conditions = {getattr(placed.stage.when, "__name__", str(placed.stage.when)) for placed in self._placed}
            raise SequenceParallelConfigError(
                setting="plan.stages",
                why=f"none runs in this forward pass: {', '.join(sorted(conditions))} are false",
                remedy="keep a stage without a condition",
            )
        state.known = sizes_of_inputs(self._plan, arguments)

    @uncompiled
    def _before_region(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if self._passes.now is None:
            return None
        assert self._plan.region is not None
        region = self._plan.region
        arguments = Arguments(region.module, module, args, kwargs)
        x, pattern = arguments.tokens(region.tokens), parse(region.layout or self._plan.tokens)
        self._enter(x, pattern, module.training)
        first = self._entered.stage_plan.rows[0]
        place = self._home() or self._place(self._now.running[0], first)
        arguments.set(region.tokens, self._entered.moves.move(x, pattern, None, place, f"plan.region {region.module}"))
        if not self._again:
            self._attributes.override()
        self._cut_buffers(place)
        self._now.inside = True
        return arguments.args, arguments.kwargs

    @uncompiled
    def _after_region(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._passes.now is None:
            return None
        assert self._plan.region is not None
        self._now.inside = False
        self._leave()
        self._attributes.restore()
        region, place = self._plan.region, self._leaves_at(self._now.running[-1])
        x, rebuild = only_tensor(output, region.module)
        pattern = parse(region.leaves or region.layout or self._plan.tokens)
        return rebuild(self._entered.moves.move(x, pattern, place, None, f"plan.region {region.module} leaves"))

    def _before(self, index: int) -> Callable[..., tuple[tuple, dict[str, Any]] | None]:
        placed = self._placed[index]
        pattern = self._plan.layout_taken(placed.stage)
        setting = f"plan layout of {placed.name}"

        @uncompiled
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            if self._border is None:
                self._alone.start(index)
            if self._is_outside(index):
                self._alone.end(None)
                return None
            arguments = Arguments(placed.name, placed.module, args, kwargs)
            refusal = self._out_of_order(index)
            if refusal is not None:
                self._agree(placed.name, refusal)
            x = arguments.tokens(placed.stage.tokens)
            if self._border is None and index == self._now.running[0]:
                self._enter(x, pattern, module.training)
                if not self._again:
                    self._attributes.override()
            self._agree(f"{placed.name}, of {self._entered.sizes}")
            place = self._place(index, self._entered.rows[index])
            moved = self._entered.moves.move(x, pattern, self._found_at(index), place, setting)
            arguments.set(placed.stage.tokens, moved)
            for argument, text in placed.stage.follows.items():
                value = arguments.get(argument)
                if value is not None:
                    setting_of = f"plan follows of {placed.name}, {argument!r}"
                    arguments.set(argument, self._own_part(value, text, place, setting_of))
            self._now.at = index
            return arguments.args, arguments.kwargs

        return hook

    def _after(self, index: int) -> Callable[..., Any]:
        placed = self._placed[index]
        pattern = self._plan.layout_given(placed.stage)

        @uncompiled
        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            if self._is_outside(index):
                return None
            self._now.at = None
            last = index == self._now.running[-1] and self._border is None
            target = None if last else self._leaves_at(index)
            if last and not self._again:
                if self._now.root is None:
                    self._finished.add(self._entered.kind)
                self._leave()
                self._attributes.restore()
            elif target is not None:
                self._cut_buffers(target)
            here = self._place(index, self._entered.rows[index])
            if target != here:
                x, rebuild = first_tensor(output)
                output = rebuild(self._entered.moves.move(x, pattern, here, target, f"plan layout of {placed.name}"))
            self._alone.end(output)
            return output

        return hook

    def _is_outside(self, index: int) -> bool:
        """Whether a stage is called where tokens are whole: outside of the region, or left out of this pass."""
        state = self._passes.now
        if state is None or (self._border is not None and not (state.inside or self._again)):
            return True
        whole = self._border is None and state.last_run in (None, state.running[-1])
        return index not in state.running and (whole or self._again)

    def _home(self) -> Place | None:
        """Where tokens have to be outside of stages."""
        return None if self._plan.between is None else Place(self._plan.between)

    def _place(self, index: int, row: StageRow) -> Place:
        """Where the tokens are while a stage runs."""
        return Place(row.sharded, padded=row.inside == "local")

    def _found_at(self, index: int) -> Place | None:
        """Where the tokens are when they reach a stage."""
        running, rows = self._now.running, self._entered.rows
        at = running.index(index)
        if at == 0 and self._border is None:
            return None
        if self._home() is not None or at > 0:
            return self._home() or self._place(running[at - 1], rows[running[at - 1]])
        return self._place(index, rows[index])

    def _leaves_at(self, index: int) -> Place | None:
        """Where the tokens are behind a stage; None behind the last, if they are whole there."""
        if index == self._now.running[-1] and self._border is None:
            return None
        return self._home() or self._place(index, self._entered.rows[index])

    def _cut_buffers(self, place: Place) -> None:
        self._attributes.cut(lambda value, text, setting: self._own_part(value, text, place, setting))

    def _out_of_order(self, index: int) -> SequenceParallelConfigError | None:
        """Why a stage must not run now; None where it is due, which counts it as run."""
        if self._again:
            return None
        state = self._now
        at = -1 if state.last_run is None else state.running.index(state.last_run)
        expected = state.running[at + 1] if at + 1 < len(state.running) else None
        # A pass may begin anew where the last one was of a part that was called by itself.
        if index in (state.running[0], expected):
            state.last_run = index
            return None
        due = self._placed[expected].name if expected is not None else "no further stage"
        return out_of_order(self._placed[index].name, due, self._plan.order)

    def _agree(self, step: str, refusal: SequenceParallelConfigError | None = None) -> None:
        """In the first pass of its kind ranks go on to each stage together: which comes next may hang on their data."""
        state = self._now
        if state.entered is None or state.entered.kind in self._finished or self._again:
            if refusal is not None:
                raise refusal
            return
        go_on(step, refusal, self._groups.sp)

    @uncompiled
    def _after_all(self, module: nn.Module, args: tuple, output: Any) -> None:
        state = self._now
        if state.last_run is None:
            return
        if state.last_run != state.running[-1]:
            missing = state.running[state.running.index(state.last_run) + 1]
            self._agree("the end of forward", left_out(self._placed[missing].name))
        assert state.entered is not None
        self._finished.add(state.entered.kind)
        # Not at the last stage's output: inside a reentrant checkpoint that has no gradient yet.
        self._passes.recall_by(all_tensors(output), state)

    @uncompiled
    def _end(self, *_: object) -> None:
        """Also when forward raised."""
        self._clean_up()
        self._passes.end()

    def _clean_up(self) -> None:
        self._leave()
        self._attributes.restore()

    def _enter(self, x: Tensor, pattern: Pattern, training: bool) -> None:
        """Take the sizes of whole tokens, and the plan for them: the same on every rank."""
        state = self._now
        if self._again:
            if self._entered.seed is not None:
                self._entered.seed.apply()
            return
        refuse_transforms("a sharded model", x)
        sizes = pattern.solve(x.shape, state.known, f"tokens of {self._placed[state.running[0]].name}")
        key = PassSizes(
            tuple(sorted(sizes.items())),
            tuple(state.running),
            tuple(x.shape),
            x.element_size(),
            x.requires_grad,
        )
        if key not in self._plans:
            running = [self._placed[index] for index in state.running]
            stage_plan = planned(self._plan, self._config, self._groups.sp.size, running, key)
            rows = dict(zip(state.running, stage_plan.rows, strict=True))
            layers = random_layers(self._root, self._plan, self._placed, rows)
            self._plans[key] = Planned(stage_plan, rows, layers)
        self._stage_plan, rows, layers = self._plans[key]
        self._leave()
        if training and self._groups.sp.size > 1:
            check_random_layers(layers)
            state.visit = RegionVisit(self._groups.sp)
        if torch.is_grad_enabled():
            meter.count(tokens=prod(sizes[dim] for dim in self._plan.dims))
        seed = state.visit.seed if state.visit is not None else None
        moves = TokenMoves(sizes, self._groups)
        state.entered = Entered(sizes, self._stage_plan, rows, moves, seed, key)

    def _leave(self) -> None:
        state = self._passes.now
        if state is not None and state.visit is not None:
            visit, state.visit = state.visit, None
            visit.leave()

    def _overridden(self, state: RegionPass) -> AbstractContextManager[object]:
        """What is run again needs the plan's overrides, too."""
        return nullcontext() if state.root is None else self._attributes.overridden(state.root)

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
        return self._entered.moves.cut(value, text, place, setting)

    def _layout_of(self, index: int) -> Callable[[], Layout | None]:
        stage = self._placed[index].stage

        def layout_now() -> Layout | None:
            state = self._passes.now
            if state is None or state.entered is None or (state.at != index and not self._again):
                return None
            row = state.entered.rows.get(index)
            return None if row is None else layout_inside(stage, row, state.entered.sizes, self._groups.sp.size)

        return layout_now
