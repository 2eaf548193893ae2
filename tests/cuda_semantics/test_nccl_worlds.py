"""What all ranks of a world ask of NCCL fits together, whoever is slow: every method, mask and order."""

from __future__ import annotations

from itertools import product

import pytest
from attention_cases import Case, world
from covering import covering, marked

from dsp_plugin.rehearsal.cuda.nccl import check
from dsp_plugin.rehearsal.cuda.process import CudaProcess

pytestmark = pytest.mark.timeout(300)

MASKS = ("full", "causal", "window", "packed")
ORDERS = ("contiguous", "zigzag", "striped", "documents")
SIZES = (2, 3, 4, 8)


def cases() -> list[Case]:
    softmax = [
        Case(method, size, 0, mask, order, tokens=131, heads=8, kv_heads=2)
        for method, mask, order, size in product(("ulysses", "ring", "usp", "lightseq"), MASKS, ORDERS, SIZES)
        if (method != "lightseq" or order == "contiguous") and (method != "usp" or size % 2 == 0)
    ]
    linear = [
        Case("lasp", size, 0, mask, order, tokens=131, heads=4, kv_heads=2, decay=decay, exchange=exchange)
        for mask, order, size, exchange, decay in product(
            ("causal", "packed"), ORDERS, SIZES, ("ring", "allgather", "scan"), ("head", "scalar")
        )
    ]
    sums = [
        Case("lasp", size, 0, "full", order, tokens=131, heads=4, kv_heads=2, decay="none")
        for order, size in product(ORDERS, SIZES)
    ]
    return [*softmax, *linear, *sums, *(Case("dsp", size, batch=batch) for size in (2, 4, 8) for batch in (1, 3, 16))]


CASES = cases()
FEW = covering([case for case in CASES if case.size == 4])


@pytest.mark.parametrize("case", marked(CASES, FEW))
def test_what_ranks_ask_of_nccl_fits_together(worker: CudaProcess, case: Case) -> None:
    passes = worker.run(world, case)
    faults = check({rank: [*done.forward.posted, *done.backward.posted] for rank, done in enumerate(passes)})
    assert not faults
    assert not [fault for done in passes for fault in done.all("faults")]


@pytest.mark.parametrize("method", ["ring", "lightseq"])
def test_a_rank_that_sends_nothing_joins_the_communicator_of_those_that_do(worker: CudaProcess, method: str) -> None:
    # The first document is the shard of rank 0, and the other that of all others.
    passes = worker.run(world, Case(method, 4, 0, "packed", tokens=128, heads=4, kv_heads=2))
    world_ = {rank: [*done.forward.posted, *done.backward.posted] for rank, done in enumerate(passes)}
    assert not check(world_)
    joins = {(rank, event.key) for rank, trace in world_.items() for event in trace if event.kind == "all_reduce"}
    without = {rank: [event for event in trace if (rank, event.key) not in joins] for rank, trace in world_.items()}
    (fault,) = check(without)
    assert fault.rule == "never joined"
    assert "ranks [0] never use" in fault.what
