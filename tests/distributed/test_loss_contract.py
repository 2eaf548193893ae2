"""The loss contract on ranks: one value, to the bit, and gradients whose mean over ranks is that of the global mean."""

from __future__ import annotations

import pytest
import torch

from dsp_plugin import SequenceParallelConfig, SequenceParallelGroups, ledger
from dsp_plugin.comm import all_gather
from dsp_plugin.layout import Layout
from dsp_plugin.sharding.loss import contract
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(60)]


def _contract(size: int, counts: list[list[int]]) -> None:
    axis = SequenceParallelGroups.build(SequenceParallelConfig(method="ulysses", size=size)).sp
    generator = torch.Generator().manual_seed(0)
    for case in counts:
        for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
            weight = torch.randn(3, generator=generator, dtype=torch.float64)
            tokens = [torch.randn(count, 3, generator=generator, dtype=torch.float64) for count in case]

            whole = weight.clone().requires_grad_()
            expected = (torch.cat(tokens) @ whole).square().mean()
            expected.backward()

            local = weight.to(dtype).requires_grad_()
            loss_sum = (tokens[axis.rank].to(dtype) @ local).square().sum()
            with ledger() as log:
                loss = contract(loss_sum, torch.tensor(case[axis.rank]), axis)
                (loss * 3).backward()
            assert log.bytes() == log.bytes(method="loss", phase="forward") == (size - 1) * 16
            torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)

            gathered = all_gather(
                torch.stack([loss.detach().expand(3), local.grad]).unsqueeze(0),
                0,
                Layout.of_sizes([1] * size),
                axis=axis,
                method="test",
            )
            values, grads = gathered[:, 0, 0], gathered[:, 1]
            assert len(set(values.tolist())) == 1, f"ranks report {values.tolist()}"
            torch.testing.assert_close(grads.double().mean(0), 3 * whole.grad, rtol=10 * tolerance, atol=10 * tolerance)
    nothing = contract(torch.zeros(()), 0, axis)
    assert nothing.isnan()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_value_and_mean_gradient_are_those_of_the_global_mean(size):
    uneven = [[7, 1, 30, 2], [0, 5, 1, 1], [4, 4, 4, 4], [1, 0, 0, 0]]
    spawn(_contract, size, size, [case[:size] for case in uneven if sum(case[:size])])
