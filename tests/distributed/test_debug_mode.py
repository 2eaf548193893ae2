"""Debug mode: ranks that do not fit together get an error that names them, soon; ranks that do get the same numbers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from dsp_plugin import CollectiveMismatchError, Layout, MaskSpec, SequenceParallelConfig, SequenceParallelGroups, ledger
from dsp_plugin.comm import all_gather, gather, reduce_scatter, replicate, ring_hop, split
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import dsp, ulysses
from dsp_plugin.methods.method import Where
from dsp_plugin.spawn import RankFailure, spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(60)]

Groups = SequenceParallelGroups
# Long enough that ranks of a busy machine find each other, short where a test waits for it to pass.
PATIENT, TIMEOUT = 15.0, 3.0


def build(debug: bool = True) -> Groups:
    config = SequenceParallelConfig(method="ulysses", size=dist.get_world_size(), debug=debug)
    return Groups.build(config)


def _other_op(groups: Groups, rank: int) -> None:
    layout = Layout("contiguous", 6, groups.sp.size)
    x = torch.zeros(layout.sizes[rank], 4)
    if rank == 1:
        reduce_scatter(torch.zeros(6, 4), 0, layout, axis=groups.sp, method="test")
    else:
        all_gather(x, 0, layout, axis=groups.sp, method="test")


def _other_method(groups: Groups, rank: int) -> None:
    layout = Layout("contiguous", 6, groups.sp.size)
    method = "ulysses" if rank == 1 else "dsp"
    all_gather(torch.zeros(layout.sizes[rank], 4), 0, layout, axis=groups.sp, method=method)


def _other_phase(groups: Groups, rank: int) -> None:
    layout = Layout("contiguous", 6, groups.sp.size)
    x = torch.zeros(6, 4, requires_grad=True)
    if rank == 1:
        split(x, 0, layout, axis=groups.sp, method="test").sum().backward()
    else:
        all_gather(torch.zeros(layout.sizes[rank], 4), 0, layout, axis=groups.sp, method="test")


def _other_dtype(groups: Groups, rank: int) -> None:
    layout = Layout("contiguous", 6, groups.sp.size)
    x = torch.zeros(layout.sizes[rank], 4, dtype=torch.bfloat16 if rank == 1 else torch.float32)
    all_gather(x, 0, layout, axis=groups.sp, method="test")


def _other_length(groups: Groups, rank: int) -> None:
    layout = Layout("contiguous", 9 if rank == 1 else 6, groups.sp.size)
    q = torch.zeros(1, layout.sizes[rank], 4, 8)
    ulysses.attention(q, q, q, what=AttentionSpec(), where=Where(groups, layout))


def _other_batch(groups: Groups, rank: int) -> None:
    x = torch.zeros(3 if rank == 1 else 2, Layout("contiguous", 6, groups.sp.size).sizes[rank], 6)
    dsp.switch(x, 1, 2, length=6, groups=groups)


def _transposed(groups: Groups, rank: int) -> None:
    """As many elements to and from everybody, of tensors that are not the same."""
    n = Layout("contiguous", 6, groups.sp.size).sizes[rank]
    x = torch.zeros(*((2, 6) if rank == 1 else (6, 2)), n, 6)
    dsp.switch(x, 2, 3, length=6, groups=groups)


def _hop(groups: Groups, rank: int) -> None:
    ring_hop(torch.zeros(5 if rank == 1 else 4), 1, (4,), axis=groups.sp, method="test")


def _wrong_length_on_one_rank(groups: Groups, rank: int) -> None:
    """The last rank's shard of 7 entries is also one of 6: it cannot see the mistake that the others see."""
    n = Layout("contiguous", 6, groups.sp.size).sizes[rank]
    dsp.switch(torch.zeros(2, n, 6), 1, 2, length=7, groups=groups)


def _absent(groups: Groups, rank: int) -> None:
    layout = Layout("contiguous", 6, groups.sp.size)
    if rank != 1:
        all_gather(torch.zeros(layout.sizes[rank], 4), 0, layout, axis=groups.sp, method="test")


def _late(groups: Groups, rank: int) -> None:
    layout = Layout("contiguous", 6, groups.sp.size)
    if rank == 1:
        time.sleep(2 * TIMEOUT)
    all_gather(torch.zeros(layout.sizes[rank], 4), 0, layout, axis=groups.sp, method="test")


def _outcome(mismatch: Callable[[Groups, int], None], by_environment: bool, limit: float) -> tuple[str, str, float]:
    os.environ["DSP_PLUGIN_DEBUG_TIMEOUT"] = str(limit)
    if by_environment:
        os.environ["DSP_PLUGIN_DEBUG"] = "1"
    groups = build(debug=not by_environment)
    start = time.monotonic()
    try:
        mismatch(groups, dist.get_rank())
        error, message = "nothing", ""
    except Exception as raised:
        error, message = type(raised).__name__, str(raised)
    return error, message, time.monotonic() - start


@pytest.mark.parametrize("by_environment", [False, True])
@pytest.mark.parametrize(
    ("mismatch", "parts"),
    [
        (_other_op, ["disagree on the op", "ranks [0, 2]: all_gather by test in forward", "ranks [1]: all_to_all"]),
        (_other_method, ["disagree on the op", "ranks [0, 2]: all_gather by dsp", "ranks [1]: all_gather by ulysses"]),
        (_other_phase, ["disagree on the op", "ranks [1]: all_gather by test in backward"]),
        (_other_dtype, ["disagree on the dtype", "ranks [0, 2]: torch.float32", "ranks [1]: torch.bfloat16"]),
        (_other_length, ["disagree on the shapes", "ranks [0, 2]: [(1, 6, 4, 8)", "ranks [1]: [(1, 9, 4, 8)"]),
        (_other_batch, ["disagree on the shapes", "ranks [0, 2]: [(2, 6, 6)]", "ranks [1]: [(3, 6, 6)]"]),
        (_transposed, ["disagree on the shapes", "ranks [0, 2]: [(6, 2, 6, 6)]", "ranks [1]: [(2, 6, 6, 6)]"]),
        (_hop, ["ring_hop by test in forward", "rank 1 sends 5 elements to rank 2, which expects 4"]),
    ],
)
def test_a_mismatch_names_the_ranks_on_every_rank(mismatch, parts, by_environment):
    for error, message, seconds in spawn(_outcome, 3, mismatch, by_environment, PATIENT, timeout=30.0):
        assert error == "CollectiveMismatchError", message
        for part in ["collective 0 on axis", *parts]:
            assert part in message, message
        assert seconds < PATIENT


def test_a_rank_that_never_arrives_is_named_within_the_timeout():
    outcomes = spawn(_outcome, 3, _absent, False, TIMEOUT, timeout=30.0)
    assert outcomes[1][0] == "nothing"
    for rank in (0, 2):
        error, message, seconds = outcomes[rank]
        assert error == "CollectiveMismatchError"
        assert f"rank {rank} is about to run all_gather by test in forward" in message
        assert f"ranks [1] did not arrive within {TIMEOUT:g} s" in message
        assert "look for a branch" in message
        assert seconds < 3 * TIMEOUT


def test_a_rank_that_arrives_when_the_others_have_left_is_told():
    outcomes = spawn(_outcome, 3, _late, False, TIMEOUT, timeout=30.0)
    assert [error for error, *_ in outcomes] == ["CollectiveMismatchError"] * 3
    assert "ranks [1] did not arrive" in outcomes[0][1]
    assert "came so late that ranks [0, 2] had left" in outcomes[1][1]


def test_a_mistake_that_only_some_ranks_can_see_is_no_hang():
    outcomes = spawn(_outcome, 2, _wrong_length_on_one_rank, False, TIMEOUT, timeout=30.0)
    assert outcomes[0][0] == "SequenceParallelConfigError"
    assert outcomes[1][0] == "CollectiveMismatchError"
    assert "ranks [0] did not arrive" in outcomes[1][1]


def _raise_unwatched(mismatch: Callable[[Groups, int], None]) -> None:
    os.environ["DSP_PLUGIN_DEBUG_TIMEOUT"] = str(PATIENT)
    mismatch(build(), dist.get_rank())


def test_an_uncaught_mismatch_reaches_every_rank():
    with pytest.raises(RankFailure) as failure:
        spawn(_raise_unwatched, 3, _other_dtype, timeout=20.0)
    assert sorted(failure.value.errors) == [0, 1, 2]
    assert all(isinstance(error, CollectiveMismatchError) for error in failure.value.errors.values())


def _everything(groups: Groups) -> tuple[list[torch.Tensor], list]:
    """A bit of every collective, forward and backward, and what the ledger saw."""
    rank, size = groups.sp.rank, groups.sp.size
    generator = torch.Generator().manual_seed(rank)
    layout = Layout("zigzag", 7, size)
    n = layout.sizes[rank]

    def leaf(*shape: int, seed: int | None = None) -> torch.Tensor:
        source = generator if seed is None else torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=source, dtype=torch.float64).requires_grad_()

    q, k, shard, whole, shared, hop = (
        leaf(2, n, 5, 4),
        leaf(2, n, 1, 4),
        leaf(n, 3),
        leaf(7, 3, seed=5),
        leaf(3, seed=6),
        leaf(4),
    )
    x = leaf(2, Layout("contiguous", 7, size).sizes[rank], 5)
    axis = groups.sp
    with ledger() as log:
        out = ulysses.attention(q, k, k, what=AttentionSpec(MaskSpec(causal=True)), where=Where(groups, layout))
        results = [
            out,
            all_gather(shard, 0, layout, axis=axis, method="test") * (rank + 1),
            reduce_scatter(whole * shard.sum(), 0, layout, axis=axis, method="test"),
            gather(
                split(whole, 0, layout, axis=axis, method="test") * shared.sum(), 0, layout, axis=axis, method="test"
            ),
            replicate(shared, axis=axis, method="test") * (rank + 1),
            ring_hop(hop, 1, axis=axis, method="test"),
            dsp.switch(x, 1, 2, length=7, groups=groups),
        ]
        torch.stack([result.square().sum() for result in results]).sum().backward()
    leaves = [q, k, shard, whole, shared, hop, x]
    return [result.detach() for result in results] + [leaf.grad for leaf in leaves], log.rows()


def _compare() -> tuple[int, int]:
    plain, plain_rows = _everything(build(debug=False))
    checked, checked_rows = _everything(build(debug=True))
    assert plain_rows == checked_rows
    assert len(plain) == len(checked)
    for ours, theirs in zip(plain, checked, strict=True):
        assert torch.equal(ours, theirs)
    # The store holds the claims of the last two collectives, not of all.
    store = dist.distributed_c10d._get_default_store()
    kept = [step for step in range(40) if store.check([f"dsp_plugin/0-1-2/{step}/{dist.get_rank()}"])]
    return len(kept), sum(row.calls for row in plain_rows)


def test_debug_mode_changes_neither_results_nor_bytes():
    for kept, calls in spawn(_compare, 3, timeout=30.0):
        assert kept == 2
        assert calls > 10
