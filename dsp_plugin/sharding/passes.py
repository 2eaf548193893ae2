"""One forward pass through a region: its state, and from the sizes it has to the planner's choice for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import Tensor, nn

from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.layout import Layout, shard_sizes
from dsp_plugin.methods import METHODS
from dsp_plugin.planner.moves import Activation, Border
from dsp_plugin.planner.stages import AttentionShape, Inside, StagePlan, StageRow, StageSpec, plan_stages
from dsp_plugin.plans.pattern import Extra, Pattern, parse
from dsp_plugin.plans.plan import Plan, matching_modules
from dsp_plugin.plans.stage import Stage
from dsp_plugin.sharding.arguments import Arguments
from dsp_plugin.sharding.placed import Placed
from dsp_plugin.sharding.random_layers import RandomLayer
from dsp_plugin.sharding.token_moves import TokenMoves
from dsp_plugin.training.randomness import RegionSeed, RegionVisit


class PassSizes(NamedTuple):
    """What a forward pass's plan hangs on.

    Attributes:
        sizes: of all dims, by name.
        running: the stages that run, by index.
        shape: of what enters.
        element_size: of what enters, in bytes.
        gradient: whether what enters needs a gradient.
    """

    sizes: tuple[tuple[str, int], ...]
    running: tuple[int, ...]
    shape: tuple[int, ...]
    element_size: int
    gradient: bool


class Planned(NamedTuple):
    """What passes of the same sizes have in common."""

    stage_plan: StagePlan
    rows: dict[int, StageRow]
    layers: list[RandomLayer]


@dataclass(frozen=True)
class Entered:
    """What is known once tokens are there: the sizes of dims, where they are sharded, the seeds, the kind of pass."""

    sizes: dict[str, int]
    stage_plan: StagePlan
    rows: dict[int, StageRow]
    moves: TokenMoves
    seed: RegionSeed | None
    kind: PassSizes


@dataclass
class RegionPass:
    """One forward pass: of the root, or of the stages alone where somebody calls them behind the root's back.

    Attributes:
        running: the stages that run in it.
        known: sizes that are known before tokens are there.
        root: the module whose forward runs; None for stages alone.
        last_run: the stage that began last.
        at: the stage that runs.
        inside: whether the plan's region runs.
        entered: None before the first stage, or the region.
        visit: to the region, in training, until it ends.
    """

    running: list[int]
    known: dict[str, int]
    root: nn.Module | None = None
    last_run: int | None = None
    at: int | None = None
    inside: bool = False
    entered: Entered | None = None
    visit: RegionVisit | None = None


def layout_inside(stage: Stage, row: StageRow, sizes: Mapping[str, int], size: int) -> Layout | None:
    """How the tokens that a stage attends along lie on ``size`` ranks; None where each rank attends by itself."""
    if row.inside == "local":
        return None
    if len(stage.computes_along) == 1:
        return Layout("contiguous", sizes[row.sharded], size)
    others = prod(sizes[dim] for dim in stage.computes_along if dim != row.sharded)
    return Layout.of_sizes([others * local for local in shard_sizes(sizes[row.sharded], size)])


def out_of_order(stage: str, due: str, order: str) -> SequenceParallelConfigError:
    """Why a stage that is not due must not run."""
    return SequenceParallelConfigError(
        setting="plan.stages",
        value=stage,
        why=f"it ran where {due} was due; stages must run once each, in the order of plan.order={order!r}",
        remedy='set order to "layers" if forward runs the stages of one layer after the other; else register '
        "the modules in the order in which forward runs them, one for each run",
    )


def left_out(stage: str) -> SequenceParallelConfigError:
    """Why forward must not end without a stage."""
    return SequenceParallelConfigError(
        setting="plan.stages",
        value=stage,
        why="forward ended without it, so the tokens were never made whole again",
        remedy='plan only modules that every forward pass runs, or name the argument that skips them as "when"',
    )


def sizes_of_inputs(plan: Plan, arguments: Arguments) -> dict[str, int]:
    """The sizes that the root's forward arguments tell, and those that the plan gives.

    Raises:
        SequenceParallelConfigError: an argument is no tensor, or two of them contradict each other.
    """
    known = dict(plan.sizes)
    for argument, text in plan.inputs.items():
        setting = f"plan.inputs {argument!r}"
        value = arguments.get(argument)
        if not isinstance(value, Tensor):
            raise SequenceParallelConfigError(
                setting=setting,
                value=text,
                why=f"forward was given {type(value).__name__} there, not a tensor",
                remedy="name an argument that every call has",
            )
        known = parse(text, setting).solve(value.shape, known, setting)
    return known


def border_module(root: nn.Module, plan: Plan) -> nn.Module | None:
    """The module of the plan's region, if it has one.

    Raises:
        SequenceParallelConfigError: its name matches no module, or several.
    """
    if plan.region is None:
        return None
    found = matching_modules(root, plan.region.module, "plan.region")
    if len(found) > 1:
        raise SequenceParallelConfigError(
            setting="plan.region",
            value=plan.region.module,
            why=f"it matches {', '.join(found)}",
            remedy="name one module",
        )
    return next(iter(found.values()))


def inside_of(config: SequenceParallelConfig) -> Inside:
    """What serves stages that compute along the sharded dim: Ulysses, or with a ring beside it USP."""
    method = config.method
    if METHODS[method].kind != "softmax":
        method = "ulysses" if config.ring_size == 1 else "usp" if config.ulysses_size > 1 else "ring"
    return Inside(method, config.ulysses_size if method == "usp" else None, config.ring_gradient_dtype)


def planned(
    plan: Plan, config: SequenceParallelConfig, size: int, stages: Sequence[Placed], key: PassSizes
) -> StagePlan:
    """The planner's choice for one forward pass.

    Raises:
        SequenceParallelConfigError: some stage can run with no dim sharded, or a size cannot be told.
    """
    sizes = dict(key.sizes)
    features = _size_of(plan.features, sizes)
    activation = Activation({dim: sizes[dim] for dim in plan.dims}, features, key.element_size, plan.batch_dim)
    specs = [_spec(plan, placed.name, placed.stage, features, sizes) for placed in stages]
    enter = leave = None
    if plan.region is not None:
        pattern = parse(plan.region.layout or plan.tokens)
        enter = _border(plan, pattern, sizes, key.element_size, key.gradient)
        leave = _border(plan, parse(plan.region.leaves or pattern.text), sizes, key.element_size, True)
    if stages[0].stage.takes is not None:
        enter = _border(plan, plan.layout_taken(stages[0].stage), sizes, key.element_size, key.gradient)
    if stages[-1].stage.gives is not None:
        leave = _border(plan, plan.layout_given(stages[-1].stage), sizes, key.element_size, True)
    return plan_stages(
        activation,
        specs,
        size,
        switching=config.method == "dsp",
        between=plan.between,
        enter=enter,
        leave=leave,
        inside=inside_of(config),
        entry_gradient=key.gradient,
    )


def _border(plan: Plan, pattern: Pattern, sizes: dict[str, int], element_size: int, gradient: bool) -> Border:
    token_bytes, extras = element_size, _extras(pattern, sizes)
    for group in pattern.groups:
        features = prod(
            int(name) if name.isdecimal() else _size_of(name, sizes) for name in group.names if name not in plan.dims
        )
        if group.extended and not set(group.names) & set(plan.dims):
            # Further features of every token, such as logits behind pixels, not tokens of another kind.
            features, extras = features + sum(extra.count for extra in extras), ()
        token_bytes *= features
    dims = tuple(name for name in plan.dims if name in pattern.names)
    return Border(token_bytes, extras, gradient, dims)


def _spec(plan: Plan, name: str, stage: Stage, features: int, sizes: dict[str, int]) -> StageSpec:
    shape = None
    if stage.attention is not None:
        assert stage.heads is not None
        shape = AttentionShape(stage.heads, stage.kv_heads or stage.heads, features // stage.heads)
    return StageSpec(name, stage.computes_along, shape, _extras(plan.layout_of(stage), sizes))


def _extras(pattern: Pattern, sizes: dict[str, int]) -> tuple[Extra, ...]:
    for group in pattern.groups:
        for extra in (group.before, group.behind):
            if extra is not None and not extra.isdecimal():
                _size_of(extra, sizes)
    return pattern.extras(sizes)


def _size_of(name: str, sizes: dict[str, int]) -> int:
    if name not in sizes:
        raise SequenceParallelConfigError(
            setting="plan.sizes",
            value=sizes,
            why=f"the size of {name!r} is not told by what enters the sharded region, nor by plan.inputs",
            remedy=f'add it, as in sizes={{"{name}": model.config.hidden_size}}',
        )
    return sizes[name]
