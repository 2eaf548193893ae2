"""The video DiT, unmodified, sharded by its plan: the same loss, the same gradients, the bytes of the stage table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsp_plugin import Layout, SequenceParallelConfig, SequenceParallelGroups, ledger, parallelize
from dsp_plugin.comm import all_gather
from dsp_plugin.models.rectified_flow import RectifiedFlowObjective
from dsp_plugin.models.video_dit import VideoDiT
from dsp_plugin.models.video_dit_plan import plan
from dsp_plugin.planner.moves import Activation
from dsp_plugin.planner.stages import AttentionShape, StageSpec, plan_stages
from dsp_plugin.spawn import spawn

pytestmark = pytest.mark.distributed
FRAMES, SIDE, PATCH, BATCH, WIDTH, HEADS, DEPTH = 7, 12, 4, 2, 32, 4, 2
PATCHES = (SIDE // PATCH) ** 2


def model_and_batch(positions: str) -> tuple[RectifiedFlowObjective, dict[str, Tensor]]:
    torch.manual_seed(5)
    model = VideoDiT(patch=PATCH, width=WIDTH, heads=HEADS, depth=DEPTH, positions=positions)
    shape = (BATCH, FRAMES, 1, SIDE, SIDE)
    batch = {
        "video": torch.randn(shape, dtype=torch.float64),
        "labels": torch.randint(10, (BATCH,)),
        "t": torch.rand(BATCH, dtype=torch.float64),
        "noise": torch.randn(shape, dtype=torch.float64),
    }
    return RectifiedFlowObjective(model).double(), batch


def _parity(size: int, method: str, positions: str, recompute: bool) -> None:
    config = SequenceParallelConfig(method=method, size=size)
    groups = SequenceParallelGroups.build(config)
    reference, batch = model_and_batch(positions)
    expected = reference(**batch)
    expected.backward()

    sharded, batch = model_and_batch(positions)
    handle = parallelize(sharded, config=config, groups=groups)
    if recompute:
        for layer in sharded.model.blocks:
            forward = layer.forward
            layer.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    with ledger() as log:
        loss = sharded(**batch)
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for (name, parameter), wanted in zip(sharded.named_parameters(), reference.parameters(), strict=True):
        grads = parameter.grad.flatten().unsqueeze(0)
        by_rank = all_gather(grads, 0, Layout.of_sizes([1] * size), axis=groups.sp, method="test")
        error = (by_rank.mean(0) - wanted.grad.flatten()).abs().max() / wanted.grad.abs().max()
        assert error < 1e-10, f"{name}: {error}"

    stage_plan = handle.stage_plan
    if size > 1:
        assert {row.inside for row in stage_plan.rows} == ({"local"} if method == "dsp" else {"local", "ulysses"})
    sent = torch.tensor([[log.bytes()]], dtype=torch.float64)
    total = all_gather(sent, 0, Layout.of_sizes([1] * size), axis=groups.sp, method="test").sum().item()
    if not recompute:
        assert total == stage_plan.total
        handle.remove()
        with ledger() as log:
            torch.testing.assert_close(sharded(**batch), expected)
        assert log.rows() == []


def _parts_by_themselves(size: int) -> None:
    """A sampler calls the model inside the objective, which the plan is for, and with other sizes each time."""
    config = SequenceParallelConfig(method="dsp", size=size)
    reference, _ = model_and_batch("rotary")
    sharded, _ = model_and_batch("rotary")
    parallelize(sharded, plan(sharded), config=config, groups=SequenceParallelGroups.build(config))
    for frames in (3, 5, 5):
        video = torch.randn(1, frames, 1, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        t, labels = torch.full((1,), 0.3, dtype=torch.float64), torch.tensor([2])
        with torch.no_grad():
            torch.testing.assert_close(sharded.model(video, t, labels), reference.model(video, t, labels))


def test_a_part_of_the_planned_module_may_be_called_by_itself():
    spawn(_parts_by_themselves, 2, 2)


def _parities(size: int, method: str) -> None:
    for positions, recompute in (("rotary", False), ("sinusoidal", False), ("rotary", True)):
        _parity(size, method, positions, recompute)


@pytest.mark.parametrize("method", ["dsp", "ulysses"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sharded_video_dit_has_the_unsharded_loss_gradients_and_the_planned_bytes(size, method):
    spawn(_parities, size, size, method)


def test_dsp_moves_half_of_ulysses_on_one_sharded_dim():
    activation = Activation({"b": 2, "t": 8, "s": 8}, features=WIDTH, element_size=4)
    attention = AttentionShape(HEADS, HEADS, WIDTH // HEADS)
    stages = [StageSpec("space", ("s",), attention), StageSpec("time", ("t",), attention)] * 4
    dsp = plan_stages(activation, stages, 4)
    one_dim = plan_stages(activation, stages, 4, switching=False)
    border = dsp.rows[0].wire.backward * 4 + dsp.leave.forward * 4
    # Seven switches join eight stages; Ulysses pays in four of them, each eight shard exchanges.
    assert (dsp.total - border) / (one_dim.total - border) == 7 / 16
