"""Sharded against unsharded: one model, one batch, the same output, gradients and bytes. Shared by the tests of plans.

    CASES = [Case(build, {"frames": 5}), Case(build, {"frames": 5}, dtype=torch.float32)]

    def test_output_gradients_and_bytes():
        for result in assert_parity(3, *CASES):
            ...

Starting ranks and importing a model's library cost more than most cases, so pass all cases of one size together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dsp_plugin import Layout, Plan, SequenceParallelConfig, SequenceParallelGroups, ledger, parallelize
from dsp_plugin.comm import all_gather
from dsp_plugin.comm.axis import Axis
from dsp_plugin.rehearsal.validate import validate_plan
from dsp_plugin.spawn import spawn

# Of a tensor's largest entry. fp64 decides whether sharding is exact.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# How far fp32 rounds differs between processors, and between gradients: the limit is this many times the error of the
# unsharded run in fp32, if that is more. The sharded run adds in another order, and in some cases is twice as far off.
ROUNDING_FACTOR = 3.0
# Some gradients are zero but for rounding, such as that of the bias of keys, which softmax does not see.
SMALLEST_GRADIENT = 1e-3

Built = tuple[nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One model and batch, and how it is sharded.

    Attributes:
        build: importable; returns the module and the keyword arguments of one call, whole. It runs under a fixed seed.
            Every parameter then gets noise, since models that start at zero compare zeros.
        settings: arguments of `build`.
        plan: a `Plan`, or an importable function from the module to one; None for the one that is known.
        config: beside ``size``.
        dtype: of parameters and floating point arguments.
        outputs: importable; picks the tensors to compare from what the module returned. All of floating point if None.
        backward: False for a model that is run without gradients.
        counted: False where the plan's bytes are not what is sent, as under recomputation.
    """

    build: Callable[..., Built]
    settings: Mapping[str, Any] = field(default_factory=dict)
    plan: Plan | Callable[[nn.Module], Plan] | None = None
    config: Mapping[str, Any] = field(default_factory=lambda: {"method": "dsp"})
    dtype: torch.dtype = torch.float64
    outputs: Callable[[Any], list[Tensor]] | None = None
    backward: bool = True
    counted: bool = True

    def built(self, computed_in: torch.dtype | None = None) -> Built:
        """The module and one call's arguments: the same on every rank and in every call.

        Args:
            computed_in: holds the values of ``dtype`` in this one.
        """
        torch.manual_seed(11)
        module, inputs = self.build(**self.settings)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
        held = computed_in or self.dtype
        return module.to(self.dtype).to(held), {name: self._leaf(value, held) for name, value in inputs.items()}

    def _leaf(self, value: Any, held: torch.dtype) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(self.dtype).to(held).requires_grad_(self.backward)
        return value


@dataclass(frozen=True)
class Result:
    """What a sharded run did.

    Attributes:
        stages: stage, sharded dim, move and what ran inside, in order.
        total: bytes of the stage table.
        sent: bytes that left all ranks.
    """

    stages: tuple[tuple[str, str, str, str], ...]
    total: int
    sent: int


def assert_parity(size: int, *cases: Case, timeout: float = 120.0) -> list[Result]:
    """Run the cases on ``size`` ranks, whole and sharded.

    Outputs and the gradients of every parameter and of every floating point argument must be those of the whole model
    in fp64, relative to the largest entry of each; the bytes sent must be those of the stage table; without hooks
    nothing may be left behind.

    Returns:
        One result per case.
    """
    return spawn(_run, size, size, cases, timeout=timeout)[0]


def faults(size: int, *cases: Case, timeout: float = 120.0) -> list[str]:
    """What the validation of the cases' plans finds: the first place that differs, and hints; "None" if it is right."""
    return spawn(_faults, size, size, cases, timeout=timeout)[0]


def _faults(size: int, cases: tuple[Case, ...]) -> list[str]:
    found = []
    for case in cases:
        config = SequenceParallelConfig(**{**case.config, "size": size})
        module, inputs = case.built()
        plan = case.plan(module) if callable(case.plan) else case.plan
        groups = SequenceParallelGroups.build(config)
        check = validate_plan(module, plan, inputs, config=config, groups=groups, backward=False)
        found.append(str(check.fault))
    return found


def _run(size: int, cases: tuple[Case, ...]) -> list[Result]:
    groups: dict[tuple[tuple[str, Any], ...], SequenceParallelGroups] = {}
    results = []
    for number, case in enumerate(cases):
        config = SequenceParallelConfig(**{**case.config, "size": size})
        key = tuple(sorted(case.config.items()))
        if key not in groups:
            groups[key] = SequenceParallelGroups.build(config)
        try:
            results.append(_compare(case, config, groups[key]))
        except AssertionError as error:
            raise AssertionError(f"case {number}, {case.settings}, {case.dtype}: {error}") from error
    return results


def _compare(case: Case, config: SequenceParallelConfig, groups: SequenceParallelGroups) -> Result:
    axis = groups.sp
    whole = _whole(case, case.dtype)
    exact = whole if case.dtype == torch.float64 else _whole(case, torch.float64)
    sharded, sharded_inputs = case.built()
    plan = case.plan(sharded) if callable(case.plan) else case.plan
    handle = parallelize(sharded, plan, config=config, groups=groups)
    with ledger() as log:
        found = _step(case, sharded, sharded_inputs)

    outputs = [f"output {index}" for index in range(len(found))]
    _check_equal(dict(zip(outputs, found, strict=True)), whole[0], exact[0], TOLERANCE[case.dtype])
    if case.backward:
        means = {
            name: _by_rank(gradient.flatten().unsqueeze(0), axis).mean(0).view_as(gradient)
            for name, gradient in _gradients(sharded, sharded_inputs).items()
        }
        largest = max(gradient.abs().max().item() for gradient in exact[1].values())
        _check_equal(means, whole[1], exact[1], TOLERANCE[case.dtype], SMALLEST_GRADIENT * largest)

    stage_plan = handle.stage_plan
    assert stage_plan is not None
    sent = int(_by_rank(torch.tensor([[float(log.bytes())]], dtype=torch.float64), axis).sum().item())
    if case.counted and case.backward:
        assert sent == stage_plan.total, f"sent {sent} bytes, the stage table has {stage_plan.total}: {log.rows()}"
    handle.remove()
    with ledger() as log, torch.no_grad():
        again = _outputs(case, sharded(**sharded_inputs))
    for name, x in zip(outputs, again, strict=True):
        off = (x - whole[0][name]).abs().max().item() / whole[0][name].abs().max().item()
        assert off < TOLERANCE[case.dtype], f"{name} without hooks is off by {off:.1e} of its largest entry"
    assert log.rows() == []
    rows = tuple((row.stage, row.sharded, row.move, row.inside) for row in stage_plan.rows)
    return Result(rows, stage_plan.total, sent)


def _whole(case: Case, computed_in: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of the unsharded model, by name."""
    module, inputs = case.built(computed_in)
    outputs = {f"output {index}": output for index, output in enumerate(_step(case, module, inputs))}
    return outputs, _gradients(module, inputs)


def _step(case: Case, module: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """One forward pass, and one backward pass from a random direction in the outputs."""
    with torch.set_grad_enabled(case.backward):
        outputs = _outputs(case, module(**inputs))
    if case.backward:
        generator = torch.Generator().manual_seed(3)
        drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
        directions = [along.to(case.dtype).to(x) for along, x in zip(drawn, outputs, strict=True)]
        parts = [(x * along).sum() for x, along in zip(outputs, directions, strict=True) if x.requires_grad]
        torch.stack(parts).sum().backward()
    return [x.detach() for x in outputs]


def _outputs(case: Case, returned: Any) -> list[Tensor]:
    return case.outputs(returned) if case.outputs is not None else list(_tensors(returned))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.is_floating_point():
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _gradients(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The gradients of what has one, by name."""
    leaves = {
        **dict(module.named_parameters()),
        **{f"argument {name}": value for name, value in inputs.items() if isinstance(value, Tensor)},
    }
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def _by_rank(x: Tensor, axis: Axis) -> Tensor:
    return all_gather(x, 0, Layout.of_sizes([1] * axis.size), axis=axis, method="test")


def _check_equal(
    found: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    tolerance: float,
    smallest: float = 0.0,
) -> None:
    """Compare with fp64, allowing for what the whole run in the same dtype is off by: in fp64 nothing."""
    assert list(found) == list(exact), f"sharded there are {list(found)}, not {list(exact)}"
    for name, x in found.items():
        wanted = exact[name]
        assert x.shape == wanted.shape, f"{name} is {tuple(x.shape)}, not {tuple(wanted.shape)}"
        scale = max(wanted.abs().max().item(), smallest)
        assert scale > 0, f"{name} is all zeros, so nothing is compared"
        error, rounding = ((y.double() - wanted).abs().max().item() / scale for y in (x, whole[name]))
        limit = max(tolerance, ROUNDING_FACTOR * rounding)
        assert error < limit, f"{name} is off by {error:.1e} of its largest entry {scale:.1e}, limit {limit:.1e}"
