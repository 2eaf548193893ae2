"""Our Triton kernels equal the fp64 oracle, drop what torch drops, and compile for GPUs that are not here."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any

import ahead_of_time
import interpreted
import pytest
import torch

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: torch for CUDA brings it"),
]
Run = Callable[..., Any]


def _elsewhere(interpreting: bool) -> Iterator[Run]:
    # Triton asks as it is imported whether it is to interpret, so a process has one answer.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1" if interpreting else "0")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
        pool.submit(find_spec, "triton").result()
    yield lambda function, *arguments: pool.submit(function, *arguments).result(200)
    for process in list(pool._processes.values()):
        process.kill()


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Run]:
    """Runs functions where Triton interprets its kernels."""
    yield from _elsewhere(True)


@pytest.fixture(scope="module")
def compiler() -> Iterator[Run]:
    """Runs functions where it compiles them."""
    yield from _elsewhere(False)


@pytest.mark.parametrize("case", interpreted.CASES, ids=lambda case: case.name)
def test_it_equals_the_oracle(interpreter: Run, case: interpreted.Case) -> None:
    interpreter(interpreted.equals_the_oracle, case)


@pytest.mark.parametrize("start", [0, 2**31 - 7, 2**32 - 40, 2**40])
def test_it_keeps_what_torch_keeps(interpreter: Run, start: int) -> None:
    interpreter(interpreted.keeps_what_torch_keeps, start)


def test_it_takes_strided_inputs(interpreter: Run) -> None:
    interpreter(interpreted.takes_strided_inputs)


def test_auto_leaves_the_interpreter_alone(interpreter: Run) -> None:
    interpreter(interpreted.auto_leaves_the_interpreter_alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merges(interpreter: Run, dtype: torch.dtype) -> None:
    interpreter(interpreted.merges, dtype)


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.matrix)])
def test_shards_of_strided_positions_add_up(interpreter: Run, size: int) -> None:
    interpreter(interpreted.shards_add_up, size)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=str(case), marks=[] if case in ahead_of_time.FEW else pytest.mark.matrix)
        for case in ahead_of_time.CASES
    ],
)
def test_it_compiles_and_fits(compiler: Run, case: ahead_of_time.Case) -> None:
    """Into the shared memory of the smallest GPU of that capability or above."""
    assert compiler(ahead_of_time.shared_memory, case) <= ahead_of_time.LEAST_SHARED
