"""Whether a plan is right for a model: one unsharded and one sharded pass on small input, compared stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dsp_plugin.comm import all_gather, ledger
from dsp_plugin.comm.axis import Axis
from dsp_plugin.comm.consent import each_for_itself
from dsp_plugin.config.schema import SequenceParallelConfig
from dsp_plugin.errors import SequenceParallelConfigError, UnsupportedError
from dsp_plugin.groups import SequenceParallelGroups
from dsp_plugin.layout import Layout
from dsp_plugin.planner.stages import StagePlan, StageRow
from dsp_plugin.plans.pattern import Pattern
from dsp_plugin.plans.plan import Plan, resolve_plan
from dsp_plugin.rehearsal.observed import ObservedPass, Visit, undisturbed
from dsp_plugin.rehearsal.plan_check import Fault, PlanCheck, StageCheck
from dsp_plugin.rehearsal.subject import Setting, Subject, subject
from dsp_plugin.rehearsal.suspects import suspects_between, suspects_of_stage
from dsp_plugin.sharding.parallelize import hooked
from dsp_plugin.sharding.token_moves import Place, TokenMoves
from dsp_plugin.spawn import RankFailure, spawn

# Of the largest entry. Sharded and unsharded sums differ in rounding, a wrong plan by much more. Some models compute
# in fp32 here and there, whatever the dtype of their weights.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# Gradients that are zero but for rounding are compared with this part of the largest.
_SMALLEST_GRADIENT = 1e-3


def validate_plan(
    module: nn.Module,
    plan: Plan | None,
    kwargs: Mapping[str, Any],
    *,
    config: SequenceParallelConfig,
    groups: SequenceParallelGroups,
    backward: bool = True,
) -> PlanCheck:
    """Compare an unsharded and a sharded pass of a model, and name the first stage that differs.

    Called on every rank of a world, with the same weights and arguments. The module keeps its mode, training or not,
    except that its dropout layers are off; its gradients and buffers are left as they were.

    Args:
        module: not parallelized yet.
        plan: to be checked; the one in the config, or the one known for the model, when None.
        kwargs: of one forward pass, whole. Small ones do; sizes that P does not divide show the most.
        backward: whether gradients of parameters are compared, too.

    Returns:
        The same on every rank. Only where the sharded pass broke off on some ranks, these return and others wait for
        them until their collectives time out: end the world then, as `validate_subject` does.

    Raises:
        SequenceParallelConfigError: the plan does not fit the names of the model, or ranks hold different weights or
            arguments.
    """
    root, plan = (module, plan) if plan is not None else resolve_plan(module, config.plan)
    with undisturbed(module):
        whole = ObservedPass(module, root, plan, kwargs, backward=backward, seed=1)
        if whole.raised is not None:
            raise whole.raised
        again = ObservedPass(module, root, plan, kwargs, backward=False, seed=2)
        _check_reference(whole, groups.sp)
        handle = hooked(root, plan, config=config, groups=groups)
        try:
            # A wrong plan fails anywhere in the model's code, on some ranks and not on others.
            with ledger() as log, each_for_itself():
                sharded = ObservedPass(module, root, plan, kwargs, backward=backward, seed=1)
        finally:
            handle.remove()
        comparison = _Comparison(root, plan, whole, sharded, handle.stage_plan, groups)
        return comparison.result(random=_error(again.outputs, whole.outputs) > 0, sent=log.bytes())


def validate_subject(
    reference: str,
    settings: Mapping[str, Setting],
    plan: str | None,
    size: int,
    method: str = "dsp",
    *,
    dtype: torch.dtype = torch.float64,
    backward: bool = True,
    timeout: float = 120.0,
) -> PlanCheck:
    """`validate_plan` of a subject, on ranks started for it on this machine.

    A model that draws random numbers in training, and differs, is looked at once more in evaluation.

    Args:
        reference: of the subject, see `rehearsal.subject`. settings: of it.
        plan: ``package.module:name``; the one known for the model when None.
        size: P. method: of the config.
        dtype: that weights and floating point arguments are converted to. Weights get a little noise, since models that
            start at zero would compare zeros.
        timeout: seconds.

    Raises:
        SequenceParallelConfigError: as `validate_plan`, or no such subject.
        RankFailure: a rank died or hung.
    """
    try:
        asked = reference, dict(settings), plan, size, method, dtype, backward
        return spawn(_validate, size, *asked, timeout=timeout)[0]
    except RankFailure as failure:
        for error in failure.errors.values():
            if isinstance(error, _BrokeOff):
                return error.check
        for error in failure.errors.values():
            if isinstance(error, SequenceParallelConfigError | UnsupportedError):
                raise error from None
        raise


class _BrokeOff(Exception):  # noqa: N818
    """Takes a result out of a rank whose neighbours may be waiting for it."""

    def __init__(self, check: PlanCheck) -> None:
        super().__init__(check)
        self.check = check


def _validate(
    reference: str,
    settings: dict[str, Setting],
    plan: str | None,
    size: int,
    method: str,
    dtype: torch.dtype,
    backward: bool,
) -> PlanCheck:
    torch.manual_seed(0)
    module, kwargs, _ = _converted(subject(reference, settings), dtype)
    config = SequenceParallelConfig(method=method, size=size, plan=plan)
    groups = SequenceParallelGroups.build(config)

    def checked() -> PlanCheck:
        check = validate_plan(module, None, kwargs, config=config, groups=groups, backward=backward)
        if check.fault is not None and check.fault.message:
            raise _BrokeOff(check)
        return check

    check = checked()
    if not check.ok and check.random and module.training:
        module.eval()
        check = checked()
    return check


def _converted(built: Subject, dtype: torch.dtype) -> Subject:
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")

    def converted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)

    with torch.no_grad():
        for parameter in built.module.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return Subject(built.module.to(device, dtype), tree_map(converted, built.kwargs))


class _Comparison:
    """Finds the first place where a sharded pass differs from a whole one.

    Each rank compares its own part of the tokens with the same part of the whole ones.
    """

    def __init__(
        self,
        root: nn.Module,
        plan: Plan,
        whole: ObservedPass,
        sharded: ObservedPass,
        stage_plan: StagePlan | None,
        groups: SequenceParallelGroups,
    ) -> None:
        self._root, self._plan, self._whole, self._sharded = root, plan, whole, sharded
        self._axis, self._stage_plan = groups.sp, stage_plan
        self._rows = stage_plan.rows if stage_plan is not None else ()
        self._tolerance = TOLERANCES[whole.outputs[0].dtype]
        self._sizes = whole.sizes(plan)
        self._moves = TokenMoves(self._sizes, groups)

    def result(self, random: bool, sent: int) -> PlanCheck:
        """The comparison; collective unless the sharded pass broke off on this rank."""
        visits = zip(self._whole.visits, self._sharded.visits, self._rows, strict=False)
        errors = [error for of_stage in visits for error in self._of(*of_stage)]
        output, gradient, total = 0.0, None, 0
        if self._sharded.raised is None:
            output = _error(self._sharded.outputs, self._whole.outputs)
            by_rank = self._by_rank([float(sent), output, *errors])
            total = int(by_rank[:, 0].sum().item())
            output, *errors = by_rank[:, 1:].amax(0).tolist()
            gradient = self._gradient()
        stages = tuple(
            StageCheck(row.stage, row.sharded, errors[2 * index], errors[2 * index + 1])
            for index, row in enumerate(self._rows[: len(errors) // 2])
        )
        fault = self._fault(stages, output, gradient)
        if fault is not None and random and not fault.message:
            hint = "the model draws random numbers, which sharding changes: call eval() on it first"
            fault = replace(fault, hints=(*fault.hints, hint))
        planned = self._stage_plan.total if self._stage_plan is not None else 0
        return PlanCheck(fault, stages, output, gradient, self._tolerance, random, total, planned)

    def _of(self, whole: Visit, sharded: Visit, row: StageRow) -> tuple[float, float]:
        place = Place(row.sharded, padded=row.inside == "local")
        if not self._moves.own(row.sharded):
            return 0.0, 0.0
        taken, given = self._plan.layout_taken(whole.stage), self._plan.layout_given(whole.stage)
        setting = f"plan layout of {whole.name}"

        def error(found: Tensor | None, tokens: Tensor | None, pattern: Pattern) -> float:
            if found is None or tokens is None:
                return 0.0
            return _error([found], [self._moves.move(tokens, pattern, None, place, setting)])

        return error(sharded.given, whole.given, taken), error(sharded.gave, whole.gave, given)

    def _gradient(self) -> tuple[str, float] | None:
        wanted = self._whole.gradients
        if not wanted:
            return None
        found = [self._sharded.gradients.get(name, torch.zeros_like(gradient)) for name, gradient in wanted.items()]
        flat = torch.cat([gradient.flatten().double() for gradient in found])
        means = self._by_rank(flat.tolist()).mean(0).split([gradient.numel() for gradient in found])
        smallest = _SMALLEST_GRADIENT * max(gradient.abs().max().item() for gradient in wanted.values())
        errors = {
            name: _error([mean.view_as(gradient)], [gradient.double()], smallest)
            for mean, (name, gradient) in zip(means, wanted.items(), strict=True)
        }
        return max(errors.items(), key=lambda item: item[1])

    def _by_rank(self, values: Sequence[float]) -> Tensor:
        row = torch.tensor([values], dtype=torch.float64, device=self._whole.outputs[0].device)
        return all_gather(row, 0, Layout.of_sizes([1] * self._axis.size), axis=self._axis, method="validate")

    def _fault(self, stages: Sequence[StageCheck], output: float, gradient: tuple[str, float] | None) -> Fault | None:
        for index, check in enumerate(stages):
            if check.given > self._tolerance:
                return self._between(index, check.given)
            if check.gave > self._tolerance:
                return self._inside(index, check.gave)
        if self._sharded.raised is not None:
            return self._broken_off(self._sharded.raised)
        if output > self._tolerance:
            return self._between(len(stages), output)
        if gradient is not None and gradient[1] > self._tolerance:
            return Fault(f"the gradient of {gradient[0]}", None, None, gradient[1])
        return None

    def _broken_off(self, error: Exception) -> Fault:
        message = f"{type(error).__name__}: {error}"
        visits = self._sharded.visits
        if self._sharded.outputs:
            return Fault("in the backward pass", None, None, inf, message)
        if visits and visits[-1].gave is not None:
            return replace(self._between(len(visits), inf), message=message)
        if visits and visits[-1].given is not None:
            return replace(self._inside(len(visits) - 1, inf), message=message)
        refused = isinstance(error, SequenceParallelConfigError | UnsupportedError)
        if visits and (not refused or str(error).startswith("plan layout")):
            return replace(self._between(len(visits) - 1, inf), message=message)
        if not visits and self._rows:
            return replace(self._between(0, inf), message=message)
        place = f"at the entry of {visits[-1].name}" if visits else "before the first stage"
        return Fault(place, visits[-1].name if visits else None, None, inf, message)

    def _inside(self, index: int, error: float) -> Fault:
        visit, sharded = self._whole.visits[index], self._rows[index].sharded
        hints = suspects_of_stage(visit.call(), self._plan, self._sizes, sharded)
        return Fault(f"in {visit.name}", visit.name, sharded, error, hints=tuple(hints))

    def _between(self, index: int, error: float) -> Fault:
        """The code before stage ``index``, or after the last."""
        visits = self._whole.visits
        before = visits[index - 1].name if index else None
        after = visits[index].name if index < len(visits) else None
        ran = visits[index].ran_before if after is not None else self._whole.ran_after
        place = (
            f"between {before} and {after}" if before and after else f"after {before}" if before else f"before {after}"
        )
        whole_there = self._plan.region is None and not (before and after)
        sharded = None if whole_there else self._plan.between or self._rows[max(index - 1, 0)].sharded
        hints = ["tokens are whole there; what code kept of them from between stages, such as a residual, is not"]
        if sharded is not None:
            hints = suspects_between(self._root, self._plan, self._sizes, sharded, ran)
        return Fault(place, None, sharded, error, hints=tuple(hints))


def _check_reference(whole: ObservedPass, axis: Axis) -> None:
    """The unsharded pass must be worth comparing with."""
    dtype = whole.outputs[0].dtype
    if dtype not in TOLERANCES:
        raise SequenceParallelConfigError(
            setting="model output", value=dtype, why="is not compared", remedy=f"use one of {[*TOLERANCES]}"
        )
    sums = [x.double().sum().item() for x in whole.outputs]
    row = torch.tensor([sums], dtype=torch.float64, device=whole.outputs[0].device)
    by_rank = all_gather(row, 0, Layout.of_sizes([1] * axis.size), axis=axis, method="validate")
    if not by_rank.isfinite().all():
        raise SequenceParallelConfigError(
            setting="model output",
            why="the unsharded model returns what is not finite, which nothing can be compared with",
            remedy="give it other weights or arguments",
        )
    spread = (by_rank.amax(0) - by_rank.amin(0)).abs().max() / by_rank.abs().max().clamp(min=1e-30)
    if spread > TOLERANCES[dtype]:
        raise SequenceParallelConfigError(
            setting="model",
            why=f"the unsharded outputs of the ranks differ by {spread:.1e}: they hold different weights or arguments",
            remedy="seed every rank alike before building the model and its arguments",
        )


def _error(found: Sequence[Tensor], wanted: Sequence[Tensor], smallest: float = 0.0) -> float:
    """Largest error relative to the largest entry of each tensor; infinite where shapes differ or NaN comes in."""
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return inf
    worst = 0.0
    for x, right in zip(found, wanted, strict=True):
        if right.numel() == 0:
            continue
        scale = max(right.detach().abs().max().item(), smallest, 1e-30)
        error = (x.detach() - right.detach()).abs().max().item() / scale
        worst = max(worst, error if error == error else inf)
    return worst
