"""The scientific ViT, unmodified, sharded by its plan from pixels to predictions: outputs, every gradient, bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import Built, Case, assert_parity
from torch import Tensor

from dsp_plugin import Layout, SequenceParallelConfig, SequenceParallelGroups, ledger, parallelize
from dsp_plugin.comm import all_gather
from dsp_plugin.models.vit import VisionTransformer
from dsp_plugin.models.vit_objective import VitObjective
from dsp_plugin.models.vit_plan import plan
from dsp_plugin.spawn import spawn

pytestmark = pytest.mark.distributed
KNOWN, HEADS, WIDTH = 5, 4, 16
AXIAL, FULL = {"attention": "axial"}, {"attention": "full"}
TWO_DIMS, THREE_DIMS = {"patch": (2, 1), "grid": (5, 7)}, {"patch": (1, 2, 1), "grid": (2, 3, 5)}
ULYSSES, DSP = {"method": "ulysses"}, {"method": "dsp"}


def build(
    patch: tuple[int, ...], grid: tuple[int, ...], variables: tuple[int, ...] = (3, 0, 4), **settings: Any
) -> Built:
    """A model, and a batch whose grid of tokens no number of ranks divides."""
    model = VisionTransformer(KNOWN, patch, width=WIDTH, heads=HEADS, depth=2, **settings)
    sides = [cells * side for cells, side in zip(grid, patch, strict=True)]
    batch = {
        "fields": torch.randn(2, len(variables), *sides),
        "variables": torch.tensor(variables),
        "wanted": torch.tensor([1, 3]),
    }
    if settings.get("lead_time"):
        batch["lead_time"] = torch.rand(2)
    return model, batch


def build_objective(latitudes: bool = False, **settings: Any) -> Built:
    """The same as a training step; the loss weighs rows."""
    model, batch = build(**settings)
    fields = batch["fields"]
    target = torch.randn(2, 2, *fields.shape[2:])
    if settings.get("classes"):
        batch["label"] = torch.tensor([1, 2])
    rows = torch.linspace(-1.2, 1.0, fields.shape[-2]) if latitudes else None
    return VitObjective(model, rows), {**batch, "target": target}


def cases(size: int) -> list[Case]:
    """Both kinds of attention on both kinds of grid, tokens in front, and what else hangs on tokens."""
    ring = {"method": "usp", "ulysses_size": 2, "ring_size": 2} if size == 4 else {"method": "usp"}
    front = {**FULL, "registers": 2, "classes": 3, "lead_time": True}
    return [
        Case(build_objective, {**TWO_DIMS, **AXIAL, "latitudes": True, "lead_time": True}, plan, DSP),
        Case(build, {**THREE_DIMS, **AXIAL}, None, DSP),
        Case(build, {**TWO_DIMS, **AXIAL, "rotary": False}, plan, ULYSSES),
        Case(build, {**TWO_DIMS, **FULL}, None, ULYSSES),
        Case(build_objective, {**TWO_DIMS, **front, "latitudes": True}, plan, ULYSSES),
        Case(build, {**THREE_DIMS, **FULL, "registers": 1}, plan, ring),
        Case(build, {**TWO_DIMS, **front}, plan, ring),
        Case(build_objective, {**TWO_DIMS, **FULL, "recompute": True}, plan, ULYSSES, counted=False),
        Case(build_objective, {**TWO_DIMS, **AXIAL, "recompute": True}, plan, DSP, counted=False),
        Case(build, {**TWO_DIMS, **AXIAL}, plan, DSP, dtype=torch.float32),
        Case(build, {**TWO_DIMS, **front}, plan, ULYSSES, dtype=torch.float32),
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sharded_vit_has_the_outputs_gradients_and_bytes_of_its_plan(size):
    results = assert_parity(size, *cases(size))
    for case, result in zip(cases(size), results, strict=True):
        inside = {served for *_, served in result.stages}
        if case.settings["grid"] == TWO_DIMS["grid"] and case.config == DSP:
            # Every dim has entries for all ranks, so axial attention needs nothing but switches.
            assert inside == {"local"} or size == 1
        if case.settings["attention"] == "full":
            assert inside - {"local"}, "one dim that is computed along has to be served inside"


SUBSETS = (((0, 1, 2), (1,)), ((4,), (0, 2, 3)), ((3, 1, 0, 2, 4), (4, 1)), ((2, 3), (2,)))


def _trained(sharded: bool, size: int, settings: dict[str, Any], method: str) -> tuple[list[float], list[int]]:
    """Losses of steps that each bring other variables; when sharded also bytes planned and sent by each step."""
    torch.manual_seed(3)
    model, _ = build(**settings)
    objective = VitObjective(model, torch.linspace(-1.0, 1.2, 10)).double()
    counts: list[int] = []
    if sharded:
        config = SequenceParallelConfig(method=method, size=size)
        groups = SequenceParallelGroups.build(config)
        handle = parallelize(objective, plan(objective), config=config, groups=groups)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.3)
    losses = []
    for variables, wanted in SUBSETS:
        fields = torch.randn(2, len(variables), 10, 7, dtype=torch.float64)
        target = torch.randn(2, len(wanted), 10, 7, dtype=torch.float64)
        optimizer.zero_grad()
        with ledger() as log:
            loss = objective(fields, torch.tensor(variables), torch.tensor(wanted), target)
            loss.backward()
        if sharded:
            for parameter in objective.parameters():
                _mean_over_ranks(parameter.grad, groups)
            mine = torch.tensor([[log.bytes()]])
            sent = all_gather(mine, 0, Layout.of_sizes([1] * size), axis=groups.sp, method="test")
            assert int(sent.sum()) == handle.stage_plan.total
            counts.append(handle.stage_plan.total)
        optimizer.step()
        losses.append(loss.item())
    return losses, counts


def _mean_over_ranks(gradient: Tensor, groups: SequenceParallelGroups) -> None:
    by_rank = all_gather(gradient[None], 0, Layout.of_sizes([1] * groups.sp.size), axis=groups.sp, method="test")
    gradient.copy_(by_rank.mean(0))


def _subsets(size: int) -> None:
    for settings, method in (({**TWO_DIMS, **AXIAL}, "dsp"), ({**TWO_DIMS, **FULL, "registers": 2}, "ulysses")):
        expected, _ = _trained(False, size, settings, method)
        found, counts = _trained(True, size, settings, method)
        assert found == pytest.approx(expected, rel=1e-10)
        # What is gathered at the end grows with what is wanted.
        assert counts[0] == counts[3] < counts[2] < counts[1]


def test_every_step_may_bring_other_variables():
    spawn(_subsets, 3, 3)
