"""What LASP moves: the formula to the byte, the same at every length, and less than Ulysses from a length on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsp_plugin import Layout, MaskSpec, SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.comm import ledger
from dsp_plugin.kernels.linear import DECAYS
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.methods import METHODS, WireBytes, Workload, lasp, ulysses
from dsp_plugin.methods.method import Where
from dsp_plugin.methods.state_exchange import EXCHANGES
from dsp_plugin.spawn import spawn
from dsp_plugin.verification import Case
from dsp_plugin.verification.linear import draw

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

CAUSAL = MaskSpec(causal=True)
SHORT, LONG = 1024, 65_536
# Small enough that 64K tokens take a second; bytes are linear in B, H, K and V.
TINY = {"batch": 1, "heads": 1, "kv_heads": 1, "head_dim": 2, "value_dim": 3}


def lasp_bytes(groups: SequenceParallelGroups, case: Case) -> WireBytes:
    """Bytes that leave this rank in one call, forward and backward, by the ledger."""
    layout, rank = case.tokens(), groups.lasp.rank
    leaves = {
        name: (x if x.dim() == 1 else layout.shard(x, 1, rank)).clone().requires_grad_()
        for name, x in draw(case).items()
        if name != "dout"
    }
    settings = {"exchange": case.exchange, "causal": case.mask.causal, "cu_seqlens": case.mask.cu_seqlens}
    with ledger() as log:
        lasp.attention(**leaves, where=Where(groups, layout), **settings).sum().backward()
    return WireBytes(log.bytes(phase="forward"), log.bytes(phase="backward"))


def build(method: str, size: int) -> SequenceParallelGroups:
    return SequenceParallelGroups.build(SequenceParallelConfig(method=method, size=size))


def _measured(size: int, cases: list[Case]) -> list[WireBytes]:
    groups = build("lasp", size)
    return [lasp_bytes(groups, case) for case in cases]


def _declared(case: Case, rank: int) -> WireBytes:
    return METHODS["lasp"].wire_bytes(case.workload(), rank)


@pytest.mark.parametrize("size", [2, 4])
def test_bytes_are_the_formulas_and_the_same_at_1k_and_64k_tokens(size: int) -> None:
    """Real runs of both lengths, every decay and every exchange by turns, also both ways and with documents."""
    shapes = [(decay, CAUSAL) for decay in DECAYS] + [("none", MaskSpec())]
    cases = [
        Case("lasp", size, length=SHORT, decay=decay, exchange=EXCHANGES[turn % 3], mask=mask, **TINY)
        for turn, (decay, mask) in enumerate(shapes)
    ]
    longer = [replace(case, length=LONG) for case in cases]
    by_rank = spawn(_measured, size, size, [*cases, *longer], timeout=180)
    for rank, sent in enumerate(by_rank):
        assert sent[: len(cases)] == sent[len(cases) :] == [_declared(case, rank) for case in cases]
    assert all(sum(by_rank[rank][n].forward for rank in range(size)) > 0 for n in range(len(cases)))


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_formula_says_what_the_papers_say(decay: str, exchange: str) -> None:
    """X, one state in fp32, from each rank that has a neighbour (LASP, ZeCO), or P - 1 summaries (LASP-2)."""
    size, batch, heads, k_dim, v_dim = 8, 2, 4, 16, 24
    state = batch * heads * k_dim * v_dim * 4
    entries = {"scalar": 1, "vector": k_dim} | dict.fromkeys(("delta", "gated-delta", "kda"), k_dim**2)
    transition = batch * heads * entries.get(decay, 0) * 4
    for length in (SHORT, LONG, 1 << 20):
        work = Workload(
            size, heads, 2, length, batch, k_dim, v_dim, element_size=2, mask=CAUSAL, decay=decay, exchange=exchange
        )
        for rank in range(size):
            forward, backward = METHODS["lasp"].wire_bytes(work, rank)
            if exchange == "allgather":
                assert (forward, backward) == (7 * (state + transition), 7 * state)
            else:
                assert (forward, backward) == (state * (rank < 7), state * (rank > 0))


def both(length: int, exchange: str, batch: int = 1, heads: int = 16, dim: int = 64, size: int = 8) -> tuple[int, int]:
    """Bytes of LASP and of Ulysses, of all ranks, forward and backward, for one bf16 attention without decay."""
    work = Workload(size, heads, heads, length, batch, dim, element_size=2, mask=CAUSAL, exchange=exchange)
    lasp_total, ulysses_total = (
        sum(sum(METHODS[method].wire_bytes(work, rank)) for rank in range(size)) for method in ("lasp", "ulysses")
    )
    return lasp_total, ulysses_total


# H = 16, D = 64, P = 8, bf16, any batch. Ulysses moves q, k, v and out there and back, 2 * 4 * (P-1)/P * H * D * 2
# bytes per token: 14336 L. LASP moves a state per border between ranks each way, 2 * (P-1) * H * D * D * 4 = 3670016,
# or by all-gather P times that.
CROSSOVER = {"ring": 256, "scan": 256, "allgather": 2048}


@pytest.mark.parametrize("exchange", CROSSOVER)
@pytest.mark.parametrize("batch", [1, 4])
def test_from_256_tokens_on_lasp_moves_less_than_ulysses(exchange: str, batch: int) -> None:
    """By all-gather from 2048 tokens on. At exactly that length both move as much."""
    length = CROSSOVER[exchange]
    ours, theirs = both(length, exchange, batch)
    assert ours == theirs == batch * 14336 * length
    ours, theirs = both(length - 8, exchange, batch)
    assert ours > theirs
    ours, theirs = both(length + 8, exchange, batch)
    assert ours < theirs
    ours, theirs = both(LONG, exchange, batch)
    assert theirs == ours * LONG // length


def _both_measured(size: int, length: int, exchange: str, heads: int, dim: int) -> tuple[int, int]:
    """What leaves this rank by LASP and by Ulysses, in real runs."""
    shape = {"batch": 1, "heads": heads, "kv_heads": heads, "head_dim": dim, "dtype": torch.bfloat16}
    case = Case("lasp", size, length=length, mask=CAUSAL, exchange=exchange, **shape)
    ours = sum(lasp_bytes(build("lasp", size), case))
    groups, layout = build("ulysses", size), Layout("contiguous", length, size)
    q, k, v = (layout.shard(draw(case)[name], 1, groups.sp.rank).clone().requires_grad_() for name in "qkv")
    with ledger() as log:
        ulysses.attention(q, k, v, what=AttentionSpec(CAUSAL), where=Where(groups, layout)).sum().backward()
    return ours, log.bytes()


@pytest.mark.parametrize("exchange", ["ring", "allgather"])
def test_the_crossover_is_there_in_real_runs(exchange: str) -> None:
    """H = 4, D = 8, P = 4: from L = D * P / 2 = 16 on, by all-gather from 64."""
    size, heads, dim = 4, 4, 8
    length = {"ring": dim * size // 2, "allgather": dim * size**2 // 2}[exchange]
    for tokens, less in ((length - size, False), (length + size, True)):
        by_rank = spawn(_both_measured, size, size, tokens, exchange, heads, dim, timeout=60)
        ours, theirs = map(sum, zip(*by_rank, strict=True))
        assert (ours, theirs) == both(tokens, exchange, 1, heads, dim, size)
        assert (ours < theirs) == less
