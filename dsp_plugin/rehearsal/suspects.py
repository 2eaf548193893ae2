"""Why a sharded stage differs: what in its unsharded call, and in the model, speaks for which mistake of a plan."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.plans.pattern import Pattern
from dsp_plugin.plans.plan import Plan, matching_modules
from dsp_plugin.plans.stage import Stage
from dsp_plugin.sharding.arguments import Arguments
from dsp_plugin.sharding.outputs import first_tensor

_SHOWN = 4


class StageCall(NamedTuple):
    """One unsharded call of a stage.

    Attributes:
        name: of its module.
        args: positional arguments, whole. kwargs: by name.
    """

    name: str
    module: nn.Module
    stage: Stage
    args: tuple
    kwargs: dict[str, Any]

    @property
    def tokens(self) -> Tensor:
        """The tokens that the stage was given."""
        return self._arguments().tokens(self.stage.tokens)

    def with_tokens(self, x: Tensor) -> Tensor:
        """What the module makes of other tokens."""
        arguments = self._arguments()
        arguments.set(self.stage.tokens, x)
        with torch.no_grad():
            return first_tensor(self.module(*arguments.args, **arguments.kwargs))[0]

    def others(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the tensors among the other arguments that the plan does not cut."""
        names = list(inspect.signature(self.module.forward).parameters)
        covered = {names[key] if isinstance(key, int) else key for key in (self.stage.tokens, *self.stage.follows)}
        passed = {**dict(zip(names, self.args, strict=False)), **self.kwargs}
        for name, value in passed.items():
            if name not in covered:
                for tensor in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(tensor, Tensor):
                        yield name, tensor

    def _arguments(self) -> Arguments:
        return Arguments(self.name, self.module, self.args, self.kwargs)


def suspects_of_stage(call: StageCall, plan: Plan, sizes: Mapping[str, int], sharded: str) -> list[str]:
    """What may be wrong with a stage whose output differs although its tokens arrived as they should.

    Args:
        call: unsharded.
        sizes: of all token dims.
        sharded: the dim that was sharded while the stage ran.
    """
    found = []
    mixed = dims_mixed(call, plan, sizes)
    planned = call.stage.computes_along
    if sharded in mixed and sharded not in planned:
        found.append(
            f"it computes along {_and(mixed)}, and {sharded} is sharded there: the plan has computes_along={planned!r}"
        )
    elif sharded in mixed and call.stage.attention is not None:
        found.append(
            f"it computes along {sharded}, which is sharded there: attention={call.stage.attention!r} may not match "
            f"all that does, or something beside attention does"
        )
    found += [
        f"its argument {name!r} {tuple(tensor.shape)} has a dim of {length} = {'*'.join(names)} entries and is not in "
        f"follows"
        for name, tensor in call.others()
        for length, names in _runs_along(tensor, plan, sizes, sharded)
    ]
    found += _batch_norms({call.name: call.module})
    # A number may be that of heads or layers just as well, so it is named only for want of better.
    return found or _numbers(call, sizes, sharded)


def suspects_between(
    root: nn.Module, plan: Plan, sizes: Mapping[str, int], sharded: str, ran: Mapping[str, nn.Module]
) -> list[str]:
    """What may be wrong with code outside of stages through which sharded tokens went.

    Args:
        root: what the plan's names are relative to.
        sharded: the dim that was sharded there.
        ran: modules that ran there, by name.
    """
    tensors = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    inside = {name for name in tensors if any(_within(name, stage) for stage in _stage_names(root, plan))}
    found = [
        f"{name} {tuple(tensor.shape)} has a dim of {length} = {'*'.join(names)} entries and is not in plan.buffers"
        for name, tensor in tensors.items()
        if name not in inside and name not in plan.buffers and name.rpartition(".")[2] not in ("weight", "bias")
        for length, names in _runs_along(tensor, plan, sizes, sharded, whole=False)
    ]
    found += _batch_norms(ran)
    if ran:
        found.append(f"modules that ran there: {', '.join(list(ran)[:_SHOWN])}{', ...' if len(ran) > _SHOWN else ''}")
    found.append(
        f"code there may only do what treats all entries of {sharded} alike: otherwise name the dim that has to be "
        f"sharded there in plan.between, make it a stage, or end the region before it"
    )
    found.append(f"an attribute that tells the whole size of {sharded} is not in plan.overrides")
    found.append("the layouts of the stages around it do not name dims in the order in which they lie in memory")
    return found


def dims_mixed(call: StageCall, plan: Plan, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The token dims that a stage computes along, found by changing tokens at one index and looking at the others.

    The module runs again, whole and without gradients.
    """
    layout, given = plan.layout_taken(call.stage), plan.layout_given(call.stage)
    try:
        sizes = layout.solve(call.tokens.shape, sizes, f"plan layout of {call.name}")
        return tuple(dim for dim in plan.dims if dim != plan.batch_dim and _mixes(call, layout, given, sizes, dim))
    except (SequenceParallelConfigError, RuntimeError):
        # Tokens that are not as the plan says: the error of the comparison speaks for itself.
        return ()


def _mixes(call: StageCall, layout: Pattern, given: Pattern, sizes: Mapping[str, int], dim: str) -> bool:
    if sizes[dim] < 2:
        return False
    place = layout.names.index(dim)
    x = call.tokens.detach()
    parts = layout.take_apart(x, sizes)
    changed = parts.main.clone()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(changed.select(place, 0).shape, generator=generator).to(changed)
    changed.select(place, 0).add_(noise * (x.abs().max() + 1))
    before = given.take_apart(call.with_tokens(x), sizes).main
    after = given.take_apart(call.with_tokens(layout.put_together(replace(parts, main=changed))), sizes).main
    moved = (after - before).narrow(given.names.index(dim), 1, sizes[dim] - 1).abs().max()
    return bool(moved > 1e-6 * before.abs().max())


def _runs_along(
    tensor: Tensor, plan: Plan, sizes: Mapping[str, int], sharded: str, whole: bool = True
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The dims of a tensor that are as long as the sharded dim, or as it with other token dims."""
    others = [dim for dim in plan.dims if dim != sharded]
    groups = [
        names
        for count in range(len(others) + 1 if whole else 1)
        for extra in combinations(others, count)
        for names in [tuple(dim for dim in plan.dims if dim in (sharded, *extra))]
    ]
    # Features come last, but masks and ids have none.
    for length in dict.fromkeys(tensor.shape[:-1] if tensor.is_floating_point() else tensor.shape):
        names = next((names for names in groups if length > 1 and prod(sizes[dim] for dim in names) == length), None)
        if names is not None:
            yield length, names


def _numbers(call: StageCall, sizes: Mapping[str, int], sharded: str) -> list[str]:
    found = []
    for name, module in call.module.named_modules(prefix=call.name):
        for attribute, value in vars(module).items():
            if type(value) is int and value == sizes[sharded] > 1 and attribute not in _OF_LAYERS:
                found.append(f"{name}.{attribute} is {value}, the size of {sharded}, and is not in plan.overrides")
    return found[:_SHOWN]


# Widths of layers, which are of features even where they happen to equal the size of a dim.
_OF_LAYERS = {"in_features", "out_features", "in_channels", "out_channels", "num_embeddings", "embedding_dim"}


def _batch_norms(modules: Mapping[str, nn.Module]) -> list[str]:
    found = [
        name
        for prefix, module in modules.items()
        for name, part in module.named_modules(prefix=prefix)
        if isinstance(part, _NormBase) and (part.training or not part.track_running_stats)
    ]
    return [f"{name} takes its statistics from the tokens that are there" for name in found[:_SHOWN]]


def _stage_names(root: nn.Module, plan: Plan) -> list[str]:
    return [name for stage in plan.stages for name in matching_modules(root, stage.modules, "plan stage")]


def _within(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _and(names: tuple[str, ...]) -> str:
    return " and ".join(names)
