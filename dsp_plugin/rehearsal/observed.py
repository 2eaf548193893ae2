"""One pass of a model, with the tokens that went in and out of every stage of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dsp_plugin.errors import SequenceParallelConfigError
from dsp_plugin.plans.pattern import parse
from dsp_plugin.plans.plan import Plan, matching_modules
from dsp_plugin.plans.stage import Stage
from dsp_plugin.rehearsal.suspects import StageCall
from dsp_plugin.sharding.arguments import Arguments
from dsp_plugin.sharding.outputs import first_tensor
from dsp_plugin.sharding.passes import sizes_of_inputs

_DROPOUT = (nn.modules.dropout._DropoutNd,)


@dataclass
class Visit:
    """What became of one stage.

    Attributes:
        given: the tokens that its module was called with; None if they never came into place.
        gave: the tokens that it returned; None if it never did.
        ran_before: modules outside of all stages that ran since the stage before, by name.
    """

    name: str
    module: nn.Module
    stage: Stage
    ran_before: dict[str, nn.Module]
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    given: Tensor | None = None
    gave: Tensor | None = None

    def call(self) -> StageCall:
        """The call, to be looked into."""
        return StageCall(self.name, self.module, self.stage, self.args, self.kwargs)


class ObservedPass:
    """One forward pass, and a backward pass from a random direction in the outputs.

    Attributes:
        visits: in the order in which stages ran.
        ran_after: modules outside of all stages that ran after the last, by name.
        outputs: the floating point tensors that the model returned.
        gradients: of parameters, by name.
        raised: what ended the pass early.
    """

    def __init__(
        self, module: nn.Module, root: nn.Module, plan: Plan, kwargs: Mapping[str, Any], *, backward: bool, seed: int
    ) -> None:
        self.visits: list[Visit] = []
        self._root_call: Arguments | None = None
        self._region_call: Arguments | None = None
        self.ran_after: dict[str, nn.Module] = {}
        self.outputs: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}
        self.raised: Exception | None = None
        undo = [_call_hook(root, self._noted("_root_call"))]
        if plan.region is not None:
            for part in matching_modules(root, plan.region.module, "plan.region").values():
                undo.append(_call_hook(part, self._noted("_region_call")))
        inside: set[str] = set()
        for stage in plan.stages:
            for name, part in matching_modules(root, stage.modules, "plan stage").items():
                undo += self._watch(name, part, stage)
                inside.add(name)
        for name, part in list(root.named_modules())[1:]:
            if not any(f"{name}.".startswith(f"{stage}.") or f"{stage}.".startswith(f"{name}.") for stage in inside):
                undo += self._note(name, part)
        try:
            with torch.random.fork_rng(), torch.set_grad_enabled(backward):
                torch.manual_seed(seed)
                self.outputs = _tensors(module(**kwargs))
            if backward:
                self.gradients = _gradients(module, self.outputs)
        except Exception as error:
            self.raised = error
        finally:
            for remove in undo:
                remove()

    def sizes(self, plan: Plan) -> dict[str, int]:
        """The sizes of names, as far as an unsharded pass tells them; what contradicts the plan is passed over."""
        sizes = dict(plan.sizes)
        with suppress(SequenceParallelConfigError):
            if self._root_call is not None:
                sizes = sizes_of_inputs(plan, self._root_call)
        with suppress(SequenceParallelConfigError):
            if plan.region is not None and self._region_call is not None:
                shape = self._region_call.tokens(plan.region.tokens).shape
                sizes = parse(plan.region.layout or plan.tokens).solve(shape, sizes, "plan.region layout")
        for visit in self.visits:
            with suppress(SequenceParallelConfigError):
                if visit.given is not None:
                    sizes = plan.layout_taken(visit.stage).solve(
                        visit.given.shape, sizes, f"plan layout of {visit.name}"
                    )
        return sizes

    def _noted(self, name: str) -> Callable[..., None]:
        def noted(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            setattr(self, name, Arguments(type(module).__name__, module, args, kwargs))

        return noted

    def _watch(self, name: str, module: nn.Module, stage: Stage) -> Iterator[Callable[[], None]]:
        def arrived(*_: Any) -> None:
            self.visits.append(Visit(name, module, stage, self.ran_after))
            self.ran_after = {}

        def entered(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            visit = self.visits[-1]
            visit.args, visit.kwargs = args, kwargs
            visit.given = Arguments(name, module, args, kwargs).tokens(stage.tokens).detach().clone()

        def left(_: nn.Module, args: tuple, output: Any) -> None:
            self.visits[-1].gave = first_tensor(output)[0].detach().clone()

        # Outside of what the plan does before the stage runs, inside of what it does afterwards.
        yield module.register_forward_pre_hook(arrived, prepend=True).remove
        yield module.register_forward_pre_hook(entered, with_kwargs=True).remove
        yield module.register_forward_hook(left, prepend=True).remove

    def _note(self, name: str, module: nn.Module) -> Iterator[Callable[[], None]]:
        def ran(*_: Any) -> None:
            if not any(name.startswith(f"{other}.") for other in self.ran_after):
                self.ran_after[name] = module

        yield module.register_forward_pre_hook(ran).remove


def _call_hook(module: nn.Module, hook: Callable[..., None]) -> Callable[[], None]:
    return module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Dropout layers off; gradients and buffers, such as running statistics, come back as they were."""
    dropping = [part for part in module.modules() if isinstance(part, _DROPOUT) and part.training]
    gradients = {parameter: parameter.grad for parameter in module.parameters()}
    buffers = {buffer: buffer.clone() for buffer in module.buffers()}
    for part in dropping:
        part.training = False
    for parameter in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for part in dropping:
            part.training = True
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)


def _tensors(output: Any) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return found or [first_tensor(output)[0]]


def _gradients(module: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
    along = [(x * direction).sum() for x, direction in zip(outputs, directions, strict=True) if x.requires_grad]
    if not along:
        return {}
    torch.stack(along).sum().backward()
    found = {name: leaf.grad for name, leaf in module.named_parameters() if leaf.grad is not None}
    for leaf in module.parameters():
        leaf.grad = None
    return found
