"""Halo and sharded short convolution against the whole sequence: values, gradients, exact bytes, any sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dsp_plugin import (
    CollectiveMismatchError,
    Layout,
    SequenceParallelConfig,
    SequenceParallelConfigError,
    SequenceParallelGroups,
    ledger,
)
from dsp_plugin.comm.relayout import relayout_bytes
from dsp_plugin.kernels.convolution import short_convolution
from dsp_plugin.layout import LAYOUTS
from dsp_plugin.methods.halo import convolve, halo_bytes, left_halo
from dsp_plugin.spawn import RankFailure, spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
SIZES = [1, 2, 3, 4]
BATCH, CHANNELS = 2, 3
PER_TOKEN = BATCH * CHANNELS * 8
# Sizes by P: even, odd, shorter than a halo, and with none on the first, an inner or the last rank.
SHARDS: dict[int, list[tuple[int, ...]]] = {
    1: [(7,), (0,)],
    2: [(4, 4), (5, 2), (1, 6), (0, 5), (5, 0)],
    3: [(4, 4, 4), (3, 3, 2), (1, 1, 1), (4, 0, 5), (0, 1, 4), (6, 1, 0)],
    4: [(3, 3, 3, 3), (3, 3, 3, 2), (1, 1, 1, 6), (2, 0, 1, 4), (0, 0, 0, 5), (0, 3, 0, 0)],
}


def build(debug: bool = True) -> SequenceParallelGroups:
    config = SequenceParallelConfig(method="ulysses", size=dist.get_world_size(), debug=debug)
    return SequenceParallelGroups.build(config)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _halo(groups: SequenceParallelGroups, sizes: tuple[int, ...], tokens: int) -> None:
    layout, rank = Layout.of_sizes(sizes), groups.lasp.rank
    whole = random(BATCH, layout.length, CHANNELS, seed=1)
    padded = torch.cat([whole.new_zeros(BATCH, tokens, CHANNELS), whole], 1)
    starts = [sum(sizes[:peer]) for peer in range(len(sizes))]
    grads = [random(BATCH, tokens, CHANNELS, seed=10 + peer) for peer in range(len(sizes))]
    x = layout.shard(whole, 1, rank).clone().requires_grad_()
    with ledger() as log:
        halo = left_halo(x, tokens, layout=layout, axis=groups.lasp)
        if halo.requires_grad:
            halo.backward(grads[rank])
    expected = padded[:, starts[rank] : starts[rank] + tokens]
    assert torch.equal(halo, expected if sizes[rank] else torch.zeros_like(expected))
    home = torch.zeros_like(padded)
    for peer, start in enumerate(starts):
        if sizes[peer]:
            home[:, start : start + tokens] += grads[peer]
    if halo.requires_grad:
        torch.testing.assert_close(x.grad, layout.shard(home[:, tokens:], 1, rank))
    formula = halo_bytes(layout, rank, tokens, PER_TOKEN)
    assert (log.bytes(phase="forward"), log.bytes(phase="backward")) == formula
    rounds = int(len(sizes) > 1 and tokens > 0)
    assert log.calls(method="lasp", collective="halo", group="lasp", phase="forward") == rounds
    assert log.calls() == 2 * rounds


def _convolution(
    groups: SequenceParallelGroups, layout: Layout, width: int, borders: tuple[int, ...] | None, with_bias: bool
) -> None:
    rank, length = groups.lasp.rank, layout.length
    whole = [random(BATCH, length, CHANNELS, seed=1), random(CHANNELS, width, seed=2), random(CHANNELS, seed=3)]
    whole = [t.requires_grad_() for t in whole[: 2 + with_bias]]
    dout = random(BATCH, length, CHANNELS, seed=4)
    expected = short_convolution(*whole, cu_seqlens=borders)
    wanted = torch.autograd.grad(expected, whole, dout)

    x = layout.shard(whole[0].detach(), 1, rank).clone().requires_grad_()
    inputs = [x, *(t.detach().clone().requires_grad_() for t in whole[1:])]
    with ledger() as log:
        out = convolve(*inputs, groups=groups, layout=layout, cu_seqlens=borders)
        found = list(torch.autograd.grad(out, inputs, layout.shard(dout, 1, rank)))
    if len(layout.sizes) > 1:
        for partial in found[1:]:
            dist.all_reduce(partial)
    torch.testing.assert_close(out, layout.shard(expected, 1, rank))
    torch.testing.assert_close(found[0], layout.shard(wanted[0], 1, rank))
    torch.testing.assert_close(found[1:], list(wanted[1:]))

    runs = layout if layout.kind == "contiguous" else Layout("contiguous", length, layout.size)
    forward, backward = halo_bytes(runs, rank, width - 1, PER_TOKEN)
    moved = relayout_bytes(layout, runs, rank, PER_TOKEN) + relayout_bytes(runs, layout, rank, PER_TOKEN)
    assert log.bytes(phase="forward") == forward + moved
    assert log.bytes(phase="backward") == backward + moved


def _each(claim: Callable[..., None], cases: list[tuple]) -> None:
    """Check a claim case by case in one world, in debug mode, and say which case failed."""
    groups = build()
    for case in cases:
        try:
            claim(groups, *case)
        except AssertionError as error:
            raise AssertionError(f"{claim.__name__}{case}: {error}") from error


@pytest.mark.parametrize("size", SIZES)
def test_halo_is_the_tokens_before_and_its_gradients_come_home(size):
    spawn(_each, size, _halo, [(sizes, tokens) for sizes in SHARDS[size] for tokens in (0, 1, 3, 9)], timeout=90.0)


def packed(length: int, first: int) -> list[tuple[int, ...] | None]:
    """Documents that end at, before and after the end of the first shard; empty ones; ones of one token."""
    middle = sorted({min(max(first + shift, 0), length) for shift in (-1, 0, 1)})
    return [None, (0, first, length), (0, *middle, *middle[-1:], length), (0, 0, 1, max(length - 1, 1), length)]


@pytest.mark.parametrize("size", SIZES)
def test_convolution_of_contiguous_shards_is_that_of_the_whole(size):
    cases = [
        (Layout.of_sizes(sizes), width, borders, width == 4)
        for sizes in SHARDS[size]
        if sum(sizes)
        for width in (1, 2, 4, 6)
        for borders in packed(sum(sizes), sizes[0])
    ]
    spawn(_each, size, _convolution, cases, timeout=90.0)


@pytest.mark.parametrize("size", SIZES)
def test_convolution_of_other_layouts_goes_there_and_back(size):
    cases = [
        (Layout(kind, length, size), 4, borders, True)
        for kind in LAYOUTS
        for length in (2, 13, 24)
        for borders in packed(length, length // 2)
    ]
    by_document = Layout("zigzag", 24, size, documents=(0, 5, 5, 17, 24))
    spawn(_each, size, _convolution, [*cases, (by_document, 4, (0, 5, 5, 17, 24), False)], timeout=90.0)


def _gradients_of_several_ranks_add_up_in_fp32() -> None:
    """256 + 1 is 256 in bfloat16, twice; 256 + 2 is not."""
    groups = build()
    layout = Layout.of_sizes((1, 1, 1, 1))
    x = torch.zeros(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    halo = left_halo(x, 3, layout=layout, axis=groups.lasp)
    halo.backward(torch.full_like(halo, 256.0 if groups.lasp.rank == 1 else 1.0))
    if groups.lasp.rank == 0:
        assert x.grad.item() == 258.0


def test_gradients_of_several_ranks_add_up_in_fp32():
    spawn(_gradients_of_several_ranks_add_up_in_fp32, 4)


def _strided() -> None:
    """One channel of many, and the expanded gradient of a sum."""
    groups = build()
    layout = Layout("contiguous", 9, groups.lasp.size)
    whole = random(1, 9, 5, seed=1)
    x = layout.shard(whole, 1, groups.lasp.rank).clone().requires_grad_()
    halo = left_halo(x[:, :, 2:3], 2, layout=layout, axis=groups.lasp)
    halo.sum().backward()
    last = groups.lasp.rank == groups.lasp.size - 1
    assert x.grad.sum().item() == (0 if last else 2)
    start = layout.spans(groups.lasp.rank)[0].start
    assert torch.equal(halo[0, :, 0], torch.cat([torch.zeros(2), whole[0, :, 2]])[start : start + 2])


def test_strides_do_not_matter():
    spawn(_strided, 3)


def _wrong(mistake: str) -> str:
    groups = build(debug=False)
    layout = Layout("zigzag" if mistake == "layout" else "contiguous", 8, groups.lasp.size)
    tokens = 3 if mistake == "shard" else 4
    try:
        if mistake == "borders":
            convolve(torch.zeros(1, 4, 2), torch.zeros(2, 3), groups=groups, layout=layout, cu_seqlens=(0, 4))
        if mistake == "weight":
            convolve(torch.zeros(1, 4, 2), torch.zeros(3, 2), groups=groups, layout=layout)
        left_halo(torch.zeros(1, tokens, 2), 2, layout=layout, axis=groups.lasp)
    except SequenceParallelConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("layout", "Use layout contiguous, or convert"),
        ("shard", "holds 4 of the 8"),
        ("borders", "last border is 4"),
        ("weight", "takes a weight [C, W]"),
    ],
)
def test_mistakes_are_explained_on_every_rank(mistake, message):
    for said in spawn(_wrong, 2, mistake):
        assert message in said


def _other_width_on_one_rank() -> None:
    groups = build()
    layout = Layout("contiguous", 8, groups.lasp.size)
    width = 3 if groups.lasp.rank == 1 else 4
    convolve(torch.zeros(1, 4, 2), torch.zeros(2, width), groups=groups, layout=layout)


def test_debug_mode_finds_ranks_that_want_different_halos():
    with pytest.raises(RankFailure, match="halo by lasp in forward: rank 0 sends 6 elements to rank 1") as failure:
        spawn(_other_width_on_one_rank, 2)
    assert {type(error) for error in failure.value.errors.values()} == {CollectiveMismatchError}
