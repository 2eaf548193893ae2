"""The hot path costs no more than it did, and what its budget allows."""

from __future__ import annotations

from typing import Any

import pytest
from attention_cases import run
from budgets import COLUMNS, ROWS, Cost, Row

from dsp_plugin.rehearsal.cuda.process import CudaProcess

pytestmark = pytest.mark.timeout(300)

_found: dict[str, Cost] = {}


def cost(worker: CudaProcess, row: Row) -> Cost:
    if row.name not in _found:
        found = worker.run(run, row.case)
        _found[row.name] = Cost.of(found.second, found.shard)
    return _found[row.name]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_nothing_costs_more_than_today(worker: CudaProcess, row: Row) -> None:
    found = cost(worker, row)
    assert all(found.within(row.today, column) for column in COLUMNS), f"{found} against {row.today}"


def budgeted() -> list[Any]:
    rows = [(row, row.budget, column) for row in ROWS for column in COLUMNS if row.budget is not None]
    return [
        pytest.param(
            row,
            column,
            id=f"{row.name}: {column}",
            marks=[]
            if row.today.within(budget, column)
            else pytest.mark.xfail(
                strict=True,
                reason=f"{column} {getattr(row.today, column)}, and the budget is {getattr(budget, column)}",
            ),
        )
        for row, budget, column in rows
    ]


@pytest.mark.parametrize(("row", "column"), budgeted())
def test_the_budget_is_held(worker: CudaProcess, row: Row, column: str) -> None:
    assert row.budget is not None
    found = cost(worker, row)
    assert found.within(row.budget, column), f"{found} against {row.budget}"
