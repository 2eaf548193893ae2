"""Ulysses and USP in rounds of heads: the results, bytes and dropped weights of one round, in less memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpointed import Storages, Through, by_context, non_reentrant, reentrant, whole
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsp_plugin import Layout, MaskSpec, SequenceParallelConfig, SequenceParallelConfigError, SequenceParallelGroups
from dsp_plugin.comm import ledger
from dsp_plugin.config.attention import attention_of
from dsp_plugin.kernels import calls
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import METHODS, in_rounds, ulysses
from dsp_plugin.methods.head_partition import head_partition
from dsp_plugin.methods.head_rounds import RoundBudget, most_rounds
from dsp_plugin.methods.method import Where
from dsp_plugin.rehearsal.memory import StorageTracker
from dsp_plugin.spawn import spawn
from dsp_plugin.training.recompute import Tape
from dsp_plugin.verification import Case, default_cases, run_cases

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(240)]

# Whole groups, one group for all, groups cut between ranks, a head each, and unlike counts on ranks.
HEADS = [(16, 8), (8, 1), (20, 5), (7, 7), (24, 3), (14, 2), (9, 3)]
DTYPES = [torch.float64, torch.float64, torch.float32, torch.bfloat16]


def in_all_rounds(method: str, size: int, heads: tuple[int, int], **fixed: Any) -> list[Case]:
    """Every mask, layout and factorization, in every number of rounds that there can be."""
    found = []
    for case in default_cases(method, size, {"heads": heads[0], "kv_heads": heads[1], **fixed}):
        ranks = case.ulysses_size or size
        if heads[0] >= ranks:
            most = most_rounds(head_partition(*heads, ranks), whole_groups=method == "usp")
            found += [replace(case, attention_rounds=count) for count in range(2, most + 1)]
    return found


def covering(method: str, size: int) -> list[Case]:
    """Some of them: head counts, masks, layouts, rounds and dtypes take turns."""
    found = [case for turn, heads in enumerate(HEADS) for case in in_all_rounds(method, size, heads)[turn::61]]
    settings = [{}, {"dropout": 0.3}, {"value_dim": 8}, {"length": 3}, {"batch": 1, "length": 41}]
    return [
        replace(case, dtype=DTYPES[turn % 4], seed=turn, **(settings[turn % 5] if case.mask.cu_seqlens is None else {}))
        for turn, case in enumerate(found)
    ]


def verify(size: int, cases: list[Case]) -> None:
    results = spawn(run_cases, size, cases, timeout=230)[0]
    assert cases
    assert all(result.refused is None for result in results)
    failures = [f"{r.case.describe()}: {'; '.join(r.failures())}" for r in results if not r.ok]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("method", "size"),
    [
        *(pytest.param("ulysses", size, marks=() if size == 3 else pytest.mark.matrix) for size in (1, 2, 3, 4, 8)),
        *(pytest.param("usp", size, marks=() if size == 4 else pytest.mark.matrix) for size in (2, 4, 8)),
    ],
)
def test_output_every_gradient_and_every_byte_are_those_of_the_formula(method: str, size: int) -> None:
    verify(size, covering(method, size))


@pytest.mark.matrix
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("method", "size"), [("ulysses", 2), ("ulysses", 3), ("ulysses", 4), ("usp", 4)])
def test_the_whole_matrix(method: str, size: int, heads: tuple[int, int]) -> None:
    cases = in_all_rounds(method, size, heads, dtype=torch.float64)
    if cases:
        verify(size, cases)


def where(method: str, length: int, layout: Any, ulysses_size: int | None = None, debug: bool = False) -> Where:
    size = dist.get_world_size()
    sizes = {} if ulysses_size is None else {"ulysses_size": ulysses_size}
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method=method, size=size, debug=debug, **sizes))
    return Where(groups, Layout(layout, length, size))


def inputs(place: Where, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient of the output: this rank's shards."""
    generator = torch.Generator().manual_seed(7)
    whole_ones = [
        torch.randn(2, place.layout.length, count, 8, generator=generator, dtype=torch.float64)
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    return [place.layout.shard(x, 1, place.groups.sp.rank).clone().to(dtype) for x in whole_ones]


def gradients(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def compare(method: str, ulysses_size: int | None, heads: int, kv_heads: int, counts: list[int]) -> list[Any]:
    """By number of rounds: what was sent, and how far the output and gradients are from those of one round."""
    place = where(method, 29, "zigzag", ulysses_size, debug=True)
    dropping = AttentionSpec(MaskSpec(causal=True), dropout_p=0.3, dropout_seed=5)
    attend = METHODS[method].attention
    found: list[Any] = []
    first: list[Tensor] = []
    outs: list[Tensor] = []
    for count in [1, *counts]:
        with ledger() as log:
            got = gradients(
                partial(attend, what=dropping, where=place, attention_rounds=count),
                *inputs(place, heads, kv_heads),
            )
        first = first or got
        qkv = [x.float() for x in inputs(place, heads, kv_heads)[:3]]
        outs.append(attend(*qkv, what=AttentionSpec(kernel="cpu_flash"), where=place, attention_rounds=count))
        off = max((x - y).abs().max().item() for x, y in zip(got, first, strict=True))
        sent = [log.bytes(phase=phase) for phase in ("forward", "backward")]
        calls_made = [log.calls(phase=phase, collective="all_to_all") for phase in ("forward", "backward")]
        found.append((sent, calls_made, off, torch.equal(outs[-1], outs[0])))
    return found


@pytest.mark.parametrize(
    ("method", "size", "ulysses_size", "heads", "kv_heads", "counts"),
    [
        ("ulysses", 2, None, 12, 2, [2, 3, 6]),
        pytest.param("ulysses", 3, None, 14, 7, [2, 3, 4], marks=pytest.mark.matrix),
        pytest.param("ulysses", 4, None, 12, 1, [2, 3], marks=pytest.mark.matrix),
        pytest.param("usp", 4, 2, 12, 6, [2, 3], marks=pytest.mark.matrix),
    ],
)
def test_rounds_send_what_one_would_in_two_collectives_each_and_drop_the_same_weights(
    method: str, size: int, ulysses_size: int | None, heads: int, kv_heads: int, counts: list[int]
) -> None:
    for found in spawn(compare, size, method, ulysses_size, heads, kv_heads, counts, timeout=120):
        (sent, _, _, _), *others = found
        assert min(sent) > 0
        for count, (sent_too, collectives, off, same_out) in zip(counts, others, strict=True):
            assert sent_too == sent
            assert collectives == [2 * count, 2 * count]
            assert off < 1e-12
            assert same_out


# Name -> how a stretch with attention is called, whether its attention is kept.
WAYS: dict[str, Through] = {
    "none": whole,
    "full, non-reentrant": non_reentrant,
    "full, reentrant": reentrant,
    "keep_attention": by_context,
}


def checkpointed(method: str, ulysses_size: int | None, rounds: int) -> dict[str, Any]:
    """By way: gradients, kernel calls and bytes of all; of the tape what it keeps, and what one round keeps."""
    place = where(method, 24, "contiguous", ulysses_size)
    attend = METHODS[method].attention
    what = AttentionSpec(MaskSpec(causal=True), dropout_p=0.25, dropout_seed=3, kernel="math")
    q, k, v, dout = inputs(place, 12, 4)
    x = torch.cat((q, k, v), 2)

    def stretch(x: Tensor, count: int = rounds) -> Tensor:
        qkv = (part.sin() for part in x.split((12, 4, 4), 2))
        return attend(*qkv, what=what, where=place, attention_rounds=count).square()

    found: dict[str, Any] = {}
    for name, way in WAYS.items():
        leaf = x.clone().requires_grad_()
        with ledger() as sent, calls() as made:
            way(stretch, leaf).backward(dout)
        found[name] = (leaf.grad, (made.forward, made.backward), sent.bytes())
    kept = []
    for count in (rounds, 1):
        tape = Tape()
        with tape.record():
            stretch(x, count)
        kept.append(tape.nbytes())
    found["kept"] = kept
    # Recomputation stops where the last round has saved what it keeps, with flights under way.
    parts = [part.clone().requires_grad_() for part in (q, k, v)]
    found["left"] = []
    for count in (1, rounds):
        last_of_stretch = checkpoint(
            partial(attend, what=what, where=place, attention_rounds=count), *parts, use_reentrant=False
        )
        gc.collect()
        gc.disable()
        with Storages() as storages:
            found["cut short"] = [x.clone() for x in torch.autograd.grad(last_of_stretch, parts, dout)]
        del last_of_stretch
        found["left"].append(storages.settled(found["left"][0] if found["left"] else 0))
        gc.enable()
    found["in one"] = torch.autograd.grad(attend(*parts, what=what, where=place), parts, dout)
    leaf = x.clone().requires_grad_()
    out = stretch(leaf)
    twice = [torch.autograd.grad(out, leaf, dout, retain_graph=True)[0] for _ in range(2)]
    found["twice"] = torch.equal(*twice) and torch.equal(twice[0], found["none"][0])
    (only_k,) = torch.autograd.grad(
        attend(q, k.requires_grad_(), v, what=what, where=place, attention_rounds=rounds), k, dout
    )
    (of_one,) = torch.autograd.grad(attend(q, k, v, what=what, where=place), k, dout)
    found["only k"] = (only_k - of_one).abs().max().item()
    with pytest.raises(RuntimeError, match=r"twice|second|differentiat"):
        torch.autograd.grad(stretch(leaf), leaf, dout, create_graph=True)[0].sum().backward()
    return found


@pytest.mark.parametrize(
    ("method", "size", "ulysses_size", "rounds"),
    [("ulysses", 2, None, 3), pytest.param("usp", 4, 2, 2, marks=pytest.mark.matrix)],
)
def test_checkpointing_and_retained_graphs(method: str, size: int, ulysses_size: int | None, rounds: int) -> None:
    for found in spawn(checkpointed, size, method, ulysses_size, rounds, timeout=120):
        gradient, (forward, backward), sent = found["none"]
        for name in WAYS:
            again = 2 if name.startswith("full") else 1
            assert torch.equal(found[name][0], gradient), name
            assert found[name][1] == (again * forward, backward), name
            assert sent < found[name][2] < 2 * sent if again == 2 else found[name][2] == sent, name
        kept, of_one = found["kept"]
        assert kept == of_one > 0, "the formula of training.recompute holds in rounds"
        assert found["twice"]
        of_one, of_rounds = found["left"]
        assert of_rounds == of_one, "a pass that was cut short is freed without a garbage collector"
        for ours, theirs in zip(found["cut short"], found["in one"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        assert found["only k"] < 1e-12


@contextmanager
def fake_world(size: int) -> Iterator[None]:
    """A world that sends nothing: what is alive does not depend on when a backend lets go of it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def alive(heads: int, kv_heads: int, count: int) -> tuple[float, float, float]:
    """In query shards: the most at a time of a forward pass without a graph, one with it, and of its backward pass.

    The inputs and their gradients' leaves are outside; what comes of both is inside.
    """
    place = where("ulysses", 64, "contiguous")
    q, k, v, _ = inputs(place, heads, kv_heads, torch.bfloat16)
    leaves = [x[:1].clone().requires_grad_() for x in (q, k, v)]
    what = AttentionSpec(MaskSpec(causal=True))

    def attend() -> Tensor:
        out: Tensor = METHODS["ulysses"].attention(*leaves, what=what, where=place, attention_rounds=count)
        return out

    shard = leaves[0].nbytes
    with torch.no_grad(), StorageTracker() as first:
        attend()
    with StorageTracker() as again:
        out = attend()
        forward = again.timeline.peak()
        total = (out * 1.0).sum()
        del out
        total.backward()
    return first.timeline.peak() / shard, forward / shard, again.timeline.peak() / shard


def test_what_is_alive_at_once_falls_by_the_rounds() -> None:
    with fake_world(2):
        found = {count: alive(32, 32, count) for count in (1, 2, 4, 16)}
        grouped = {count: alive(32, 8, count) for count in (1, 2, 4)}
    # An output that is whole, and of a round: 3 gathered, 6 in the buffers of the next, its own output and lse, that
    # of the one before and its way back.
    for count in (4, 16):
        assert found[count][0] <= 1 + 12.25 / count + 0.01
    # What arrives is not unpacked.
    assert found[1][0] == 6.25
    # What is kept is 4 and the output; backward ends in 3 for the gradients that came and 3 for the whole ones.
    for count in (4, 16):
        assert found[count][1] <= 5 + 13 / count + 0.1
        assert found[count][2] <= 6 + 6 / count + 0.1
    assert found[1][2] >= 12
    for of_pass in range(3):
        falling = [found[count][of_pass] for count in (1, 2, 4)]
        assert falling == sorted(falling, reverse=True) or of_pass == 1
        assert grouped[4][of_pass] < grouped[1][of_pass]


def events() -> list[str]:
    """What happens on this rank, forward then backward, in three rounds of which the last two share a key."""
    log: list[str] = []

    class Logged(in_rounds.Flight):
        def __init__(self, packed: Any, routes: Any, sender: Any) -> None:
            self.name = f"{len(routes)} tensors {'to heads' if routes[0].scatter_dim == 2 else 'to tokens'}"
            log.append(f"start {self.name}")
            super().__init__(packed, routes, sender)

        def wait(self) -> Any:
            if self._exchange is not None:
                log.append(f"wait {self.name}")
            return super().wait()

    def logged(compute: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            log.append("compute")
            return compute(*args)

        return run

    in_rounds.Flight = Logged
    ulysses.block_forward, ulysses.block_backward = logged(ulysses.block_forward), logged(ulysses.block_backward)
    place = where("ulysses", 16, "contiguous")
    q, k, v, dout = inputs(place, 8, 4)
    gradients(
        lambda *qkv: METHODS["ulysses"].attention(*qkv, what=AttentionSpec(), where=place, attention_rounds=3),
        *(q, k, v, dout),
    )
    return log


def test_the_next_heads_and_the_last_results_travel_while_a_round_computes() -> None:
    # Two groups of two in three rounds: the first is cut.
    q, qkv, back = "1 tensors to heads", "3 tensors to heads", "1 tensors to tokens"
    gradient, all_gradients = "1 tensors to tokens", "3 tensors to tokens"
    for log in spawn(events, 2, timeout=60):
        assert log == [
            f"start {qkv}",
            *(f"wait {qkv}", f"start {q}", "compute"),
            *(f"start {back}", f"wait {q}", f"start {qkv}", "compute"),
            *(f"wait {back}", f"start {back}", f"wait {qkv}", "compute"),
            *(f"wait {back}", f"start {back}", f"wait {back}"),
            f"start {q}",
            *(f"wait {q}", f"start {q}", "compute", f"start {all_gradients}"),
            *(f"wait {q}", f"start {q}", "compute", f"wait {all_gradients}", f"start {gradient}"),
            *(f"wait {q}", "compute", f"wait {gradient}", f"start {all_gradients}", f"wait {all_gradients}"),
        ]


def refused(method: str, ulysses_size: int | None, heads: int, kv_heads: int, rounds: Any) -> tuple[str, int]:
    place = where(method, 16, "contiguous", ulysses_size)
    q, k, v, _ = inputs(place, heads, kv_heads)
    with ledger() as log, pytest.raises(SequenceParallelConfigError) as failure:
        METHODS[method].attention(q, k, v, what=AttentionSpec(), where=place, attention_rounds=rounds)
    return str(failure.value), log.bytes()


@pytest.mark.parametrize(
    ("size", "call", "said"),
    [
        (3, ("ulysses", None, 6, 2, 2), "6 query heads over ulysses_size=3 leave a rank 1"),
        pytest.param(2, ("ulysses", None, 6, 2, RoundBudget(100)), "in 3 rounds", marks=pytest.mark.matrix),
        pytest.param(4, ("usp", 2, 8, 2, 2), "2 key/value heads over ulysses_size=2", marks=pytest.mark.matrix),
    ],
)
def test_what_cannot_be_is_refused_alike_before_anything_is_sent(size: int, call: Any, said: str) -> None:
    found = spawn(refused, size, *call, timeout=60)
    assert len({text for text, _ in found}) == 1
    for text, sent in found:
        assert said in text
        assert sent == 0


def test_the_setting_reaches_the_attention() -> None:
    with fake_world(2):
        place = where("ulysses", 16, "contiguous")
        q, k, v, _ = inputs(place, 8, 4)
        for memory, calls_made in (({}, 2), ({"attention_rounds": 4}, 8), ({"attention_rounds": "12KiB"}, 4)):
            config = SequenceParallelConfig(method="ulysses", size=2, memory=memory)
            with ledger() as log:
                attention_of(config)(q, k, v, what=AttentionSpec(), where=place)
            assert log.calls() == calls_made
