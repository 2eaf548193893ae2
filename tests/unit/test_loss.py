"""The loss contract's arithmetic on one process; `tests/distributed/test_loss_contract.py` has the ranks."""

from __future__ import annotations

import pytest
import torch

from dsp_plugin import SequenceParallelGroups
from dsp_plugin.comm import ledger
from dsp_plugin.sharding.loss import contract

ALONE = SequenceParallelGroups.single().sp


def test_on_one_rank_it_is_the_mean():
    losses = torch.randn(7, dtype=torch.float64, requires_grad=True)
    with ledger() as log:
        loss = contract(losses.sum(), 7, ALONE)
        loss.backward()
    torch.testing.assert_close(loss, losses.mean())
    torch.testing.assert_close(losses.grad, torch.full((7,), 1 / 7, dtype=torch.float64))
    assert log.rows() == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_shape_stay(dtype):
    total = torch.tensor(6.0, dtype=dtype, requires_grad=True)
    loss = contract(total, torch.tensor(4), ALONE)
    loss.backward()
    assert (loss.dtype, loss.shape, loss.item()) == (dtype, (), 1.5)
    assert (total.grad.dtype, total.grad.item()) == (dtype, 0.25)


def test_the_incoming_gradient_is_passed_on():
    total = torch.tensor(6.0, requires_grad=True)
    (contract(total, 4, ALONE) * 8).backward()
    assert total.grad.item() == 2.0


def test_no_token_at_all_is_nan_as_in_a_plain_mean():
    assert contract(torch.tensor(0.0), 0, ALONE).isnan()
    assert torch.tensor([]).mean().isnan()


def test_an_infinite_loss_stays_infinite():
    assert contract(torch.tensor(float("inf"), requires_grad=True), 4, ALONE).item() == float("inf")
