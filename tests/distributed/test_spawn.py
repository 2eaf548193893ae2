"""`spawn`: results by rank; what goes wrong on a rank is an error that shows it, soon, and no process stays behind."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from dsp_plugin import CollectiveMismatchError, SequenceParallelConfigError
from dsp_plugin.spawn import RankFailure, spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(60)]


def _describe(base: int) -> tuple[int, int, int, torch.Tensor]:
    total = torch.tensor([float(dist.get_rank() + base)])
    dist.all_reduce(total)
    return dist.get_rank(), int(os.environ["RANK"]), torch.get_num_threads(), total


def test_results_come_by_rank_from_one_threaded_ranks_of_one_world():
    results = spawn(_describe, 3, 10)
    assert [(rank, env, threads) for rank, env, threads, _ in results] == [(rank, rank, 1) for rank in range(3)]
    assert all(total.item() == 33 for *_, total in results)


class _NeedsTwo(ValueError):  # noqa: N818
    """An exception that pickles but does not unpickle."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def _raise_on(rank: int, kind: str) -> Callable[[], None] | None:
    if dist.get_rank() == rank:
        if kind == "config":
            raise SequenceParallelConfigError(setting="size", value=3, why="it is odd", remedy="make it even")
        if kind == "unloadable":
            raise _NeedsTwo(1, 2)
        if kind == "died":
            os._exit(3)
        if kind == "aborted":
            os.abort()
        if kind == "unpicklable result":
            return lambda: None
    return None


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("config", SequenceParallelConfigError, "size=3: it is odd. Make it even."),
        ("unloadable", RuntimeError, "_NeedsTwo: 1 and 2"),
        ("died", RuntimeError, "rank 1 died without a word, with exit status 3"),
        ("aborted", RuntimeError, "rank 1 died without a word, by SIGABRT\nIf ranks may have taken different paths"),
        ("unpicklable result", RuntimeError, "cannot be pickled"),
    ],
)
def test_a_failing_rank_is_named_with_its_error(kind, error, text):
    with pytest.raises(RankFailure, match="--- rank 1") as failure:
        spawn(_raise_on, 2, 1, kind, timeout=20.0)
    assert list(failure.value.errors) == [1]
    assert isinstance(failure.value.errors[1], error)
    assert text in str(failure.value)
    assert not isinstance(failure.value.errors[1], CollectiveMismatchError)


def _end_at_once_or_later() -> int:
    if dist.get_rank() == 0:
        return 0
    time.sleep(0.5)
    pair = dist.new_group([1, 2], use_local_synchronization=True)
    total = torch.ones(1)
    dist.all_reduce(total, group=pair)
    return int(total)


def test_a_rank_that_is_done_does_not_disturb_those_at_work():
    assert spawn(_end_at_once_or_later, 3) == [0, 2, 2]


def _hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        threading.Event().wait()


def test_a_hanging_rank_is_shown_by_its_stack_and_killed():
    others = set(multiprocessing.active_children())
    start = time.monotonic()
    with pytest.raises(RankFailure) as failure:
        spawn(_hang_on, 2, 1, timeout=4.0)
    assert time.monotonic() - start < 20
    assert "rank 1 still running, limit 4 s" in str(failure.value)
    assert "_hang_on" in str(failure.value)
    assert "rank 0" not in str(failure.value)
    assert failure.value.errors == {}
    assert set(multiprocessing.active_children()) <= others


def _fail_while_others_wait() -> None:
    if dist.get_rank() == 0:
        raise SequenceParallelConfigError("only rank 0 saw it")
    threading.Event().wait()


def test_ranks_that_wait_for_a_failed_one_do_not_delay_its_error():
    start = time.monotonic()
    with pytest.raises(RankFailure, match="only rank 0 saw it") as failure:
        spawn(_fail_while_others_wait, 3, timeout=50.0)
    assert time.monotonic() - start < 15
    assert list(failure.value.errors) == [0]
    assert "rank 2 still running" in str(failure.value)
