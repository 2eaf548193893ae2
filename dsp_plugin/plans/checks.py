"""Plans that cannot be meant, refused when they are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.plans.pattern import parse
from dsp_plugin.plans.stage import Region, Stage


def check_plan(
    *,
    tokens: str,
    stages: Sequence[Stage],
    batch_dim: str | None,
    order: str,
    inputs: Mapping[int | str, str],
    buffers: Mapping[str, str],
    between: str | None,
    region: Region | None,
) -> None:
    """Check the parts of a `Plan` against each other.

    Raises:
        SequenceParallelConfigError: two of them contradict each other, or one cannot be read.
    """
    names = tokens.split()
    if len(names) != len(set(names)) or len(names) < 3 or not all(name.isidentifier() for name in names):
        raise SequenceParallelConfigError(
            setting="plan.tokens",
            value=tokens,
            why="expected a distinct name for each dim, features last",
            remedy='write "b t s c"; how a module lays them out goes into the layout of its stage',
        )
    if not stages:
        raise SequenceParallelConfigError(
            setting="plan.stages",
            value=stages,
            why="a plan needs at least one stage",
            remedy="name the modules that mix tokens",
        )
    *dims, features = names
    bordered = between is None and region is None
    for stage in stages:
        _check_stage(stage, tokens, dims, features, bordered)
    _check_dim("plan.between", between, dims)
    if between is not None and between == batch_dim:
        raise SequenceParallelConfigError(
            setting="plan.between",
            value=between,
            why="it is the batch_dim, which data parallelism shards",
            remedy="name another dim, or set batch_dim to None",
        )
    if order not in ("modules", "layers"):
        raise SequenceParallelConfigError(
            setting="plan.order", value=order, why="unknown", remedy='use "modules" or "layers"'
        )
    if region is not None:
        _check_layout("plan.region layout", region.layout, dims)
        # The region may reduce other dims, as one that returns class tokens does.
        still_there = [between] if between is not None else []
        _check_layout("plan.region leaves", region.leaves, still_there)
    for path, text in buffers.items():
        _check_follows(f"plan.buffers {path!r}", text, dims)
    for argument, text in inputs.items():
        parse(text, f"plan.inputs {argument!r}")


def _check_stage(stage: Stage, tokens: str, dims: Sequence[str], features: str, bordered: bool) -> None:
    unknown = [dim for dim in stage.computes_along if dim not in dims]
    if unknown:
        raise SequenceParallelConfigError(
            setting=f"plan stage {stage.modules!r} computes_along",
            value=stage.computes_along,
            why=f"{unknown} not among the token dims {list(dims)} of {tokens!r}",
            remedy="use the names of plan.tokens",
        )
    _check_layout(f"plan stage {stage.modules!r} layout", stage.layout, (*dims, features))
    for setting, text in (("takes", stage.takes), ("gives", stage.gives)):
        _check_layout(f"plan stage {stage.modules!r} {setting}", text, dims)
        if text is not None and not bordered:
            raise SequenceParallelConfigError(
                setting=f"plan stage {stage.modules!r} {setting}",
                value=text,
                why="with a region or a dim between stages, tokens are split and gathered around stages, not by them",
                remedy="describe the border in Region(layout=..., leaves=...)",
            )
    if stage.attention is not None and stage.heads is None:
        raise SequenceParallelConfigError(
            setting=f"plan stage {stage.modules!r} heads",
            why=f"attention={stage.attention!r} is given without its number of heads",
            remedy="add heads=..., so that the planner can price Ulysses inside the stage",
        )
    for argument, text in stage.follows.items():
        _check_follows(f"plan stage {stage.modules!r} follows {argument!r}", text, dims)


def _check_layout(setting: str, text: str | None, wanted: Sequence[str]) -> None:
    if text is None:
        return
    names = parse(text, setting).names
    missing = [dim for dim in wanted if dim not in names]
    if missing:
        raise SequenceParallelConfigError(
            setting=setting,
            value=text,
            why=f"it does not name {', '.join(missing)}",
            remedy="name every dim of plan.tokens, those that lie in one dim in parentheses, as in (b t)",
        )


def _check_follows(setting: str, text: str, dims: Sequence[str]) -> None:
    if not any(set(parse(part, setting).names) & set(dims) for part in text.split("|")):
        raise SequenceParallelConfigError(
            setting=setting,
            value=text,
            why=f"the pattern names none of the token dims {list(dims)}, so it would never be cut",
            remedy="name every dim, the token dims as in plan.tokens",
        )


def _check_dim(setting: str, dim: str | None, dims: Sequence[str]) -> None:
    if dim is not None and dim not in dims:
        raise SequenceParallelConfigError(
            setting=setting, value=dim, why=f"not among the token dims {list(dims)}", remedy="use a name of plan.tokens"
        )
