"""Nothing on the hot path makes the host wait for a GPU, or a GPU for the host; buffers live until NCCL has done."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from attention_cases import Case, Run, run
from covering import covering, marked

from dsp_plugin.rehearsal.cuda.process import CudaProcess

pytestmark = pytest.mark.timeout(300)

DTYPES = ("bfloat16", "float16", "float32")
RECOMPUTED = ("none", "full", "keep_attention")
ORDERS = ("contiguous", "zigzag", "striped", "documents")
# Fewer where torch's plain kernel does the work, in as many tiles as there are tokens.
LENGTH = {"bfloat16": 4096, "float16": 4096, "float32": 1024}


def softmax_cases() -> list[Case]:
    table = product(("ulysses", "ring", "usp", "lightseq"), ("full", "causal", "window", "packed"), ORDERS, (2, 4, 8))
    found = []
    for index, ((method, mask, order, size), recompute, dtype) in enumerate(product(table, RECOMPUTED, DTYPES)):
        if method == "lightseq" and order != "contiguous":
            continue
        # The head counts of the models that people have, and those that do not divide.
        heads, kv_heads = ((32, 8), (28, 4), (12, 12))[index % 3]
        shape = {"tokens": LENGTH[dtype] + index % 2 * 3, "heads": heads, "kv_heads": kv_heads}
        found.append(Case(method, size, index % size, mask, order, recompute, dtype, **shape))
    return found


def linear_cases() -> list[Case]:
    decays = ("none", "head", "scalar", "vector", "delta", "gated-delta", "kda")
    table = product(decays, ("ring", "allgather", "scan"), ("causal", "packed"), ORDERS, (2, 4, 8))
    found = [
        Case(
            *("lasp", size, index % size, mask, order, RECOMPUTED[index % 3], DTYPES[index // 3 % 3]),
            **{"tokens": 131, "decay": decay, "exchange": exchange},
        )
        for index, (decay, exchange, mask, order, size) in enumerate(table)
    ]
    both_ways = product(ORDERS, (2, 4, 8), RECOMPUTED)
    return found + [
        Case("lasp", size, index % size, "full", order, recompute, DTYPES[index % 3], tokens=131, decay="none")
        for index, (order, size, recompute) in enumerate(both_ways)
    ]


def switch_cases() -> list[Case]:
    # The last batch is too large for an exchange per row of it.
    table = product((2, 4, 8), RECOMPUTED[:2], DTYPES, (1, 3, 16))
    return [
        Case("dsp", size, index % size, recompute=recompute, dtype=dtype, batch=batch)
        for index, (size, recompute, dtype, batch) in enumerate(table)
    ]


def covered(cases: list[Case]) -> list[Case]:
    """The covering subset of small worlds, whose columns are those that matter to which code runs."""
    small = [case for case in reversed(cases) if case.size <= 4]
    columns = {replace(case, rank=0, tokens=0, heads=0, kv_heads=0): case for case in small}
    return [columns[row] for row in covering(list(columns))]


SOFTMAX, LINEAR, SWITCHES = softmax_cases(), linear_cases(), switch_cases()


def assert_nothing_waits(found: Run) -> None:
    for done in found[:2]:
        assert not done.all("syncs")
        assert not done.all("mixed")
        assert not done.all("faults")
    second = found.second
    assert not second.all("made")
    assert not second.all("uploads")
    assert second.forward.lookups == second.backward.lookups == 0
    # What is worked out from layouts and masks is copied once, to be kept for all layers.
    assert all("dsp_plugin/integers.py" in where for where in (*found.first.all("made"), *found.first.all("uploads")))


@pytest.mark.parametrize("case", marked(SOFTMAX, covered(SOFTMAX)))
def test_softmax_attention_waits_for_nothing(worker: CudaProcess, case: Case) -> None:
    found = worker.run(run, case)
    assert_nothing_waits(found)
    # A kernel that takes the dtype does all of the work.
    assert (found.second.forward.attention > 0) == (case.dtype != "float32")


@pytest.mark.parametrize("case", marked(LINEAR, covered(LINEAR)))
def test_linear_attention_waits_for_nothing(worker: CudaProcess, case: Case) -> None:
    assert_nothing_waits(worker.run(run, case))


@pytest.mark.parametrize("case", marked(SWITCHES, covered(SWITCHES)))
def test_switches_wait_for_nothing(worker: CudaProcess, case: Case) -> None:
    assert_nothing_waits(worker.run(run, case))
