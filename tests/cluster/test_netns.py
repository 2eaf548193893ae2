"""Claims about ranks on hosts of their own: exact over a real link, and the ledger counts what the wire counts."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.netns import HostFailure, Hosts, hosts, sent_bytes, why_not
from dsp_plugin import Layout, MaskSpec, SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.comm import ledger
from dsp_plugin.kernels.reference import dense_attention
from dsp_plugin.kernels.spec import AttentionSpec
from dsp_plugin.layout import LayoutKind
from dsp_plugin.methods import METHODS, Workload
from dsp_plugin.methods.method import Where

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

CAUSAL = MaskSpec(causal=True)
LAYOUTS: dict[str, LayoutKind] = {"ring": "zigzag", "lightseq": "contiguous"}
LENGTH, HEADS, KV_HEADS, HEAD_DIM = 1501, 4, 2, 64


@pytest.fixture(scope="module")
def pair() -> Iterator[Hosts]:
    reason = why_not(shaped=False)
    if reason is not None:
        pytest.skip(reason)
    with hosts() as both:
        yield both


def attend_on_host() -> dict[str, dict[str, float]]:
    """By method: the greatest error against the oracle, and bytes by the ledger, the formula and the interface."""
    torch.manual_seed(7)
    shapes = [(1, LENGTH, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    *inputs, dout = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    whole = [x.clone().requires_grad_() for x in inputs]
    expected, _ = dense_attention(*whole, mask=CAUSAL)
    wanted = (expected.detach(), *torch.autograd.grad(expected, whole, dout))
    return {method: _attend(method, inputs, dout, wanted) for method in LAYOUTS}


def _attend(method: str, inputs: list[Tensor], dout: Tensor, wanted: tuple[Tensor, ...]) -> dict[str, float]:
    groups = SequenceParallelGroups.build(SequenceParallelConfig(method=method, size=2))
    rank, layout = groups.sp.rank, Layout(LAYOUTS[method], LENGTH, 2)
    shards = [layout.shard(x, 1, rank).clone().requires_grad_() for x in inputs]
    attention = METHODS[method].attention
    assert attention is not None
    dist.barrier()
    before = sent_bytes()
    with ledger() as log:
        out = attention(*shards, what=AttentionSpec(CAUSAL), where=Where(groups, layout))
        found = (out, *torch.autograd.grad(out, shards, layout.shard(dout, 1, rank)))
    dist.barrier()
    on_wire = sent_bytes() - before
    errors = [(x - layout.shard(y, 1, rank)).abs().max().item() for x, y in zip(found, wanted, strict=True)]
    workload = Workload(2, HEADS, KV_HEADS, LENGTH, 1, HEAD_DIM, element_size=8, layout=layout.kind, mask=CAUSAL)
    formula = METHODS[method].wire_bytes(workload, rank)
    return {"error": max(errors), "ledger": log.bytes(), "formula": sum(formula), "wire": on_wire}


def test_exact_between_hosts_and_the_interface_counts_what_the_ledger_counts(pair: Hosts) -> None:
    ranks = pair.run(attend_on_host, timeout=60.0)
    for method in LAYOUTS:
        for rank in ranks:
            assert rank[method]["error"] < 1e-12
            assert rank[method]["ledger"] == rank[method]["formula"]
        by_ledger, on_wire = (sum(rank[method][count] for rank in ranks) for count in ("ledger", "wire"))
        assert by_ledger > 2_000_000
        # Headers and acknowledgements come on top, nothing else.
        assert 1.0 < on_wire / by_ledger < 1.08


def raise_on_one_host() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the second host is unhappy")
    dist.barrier()


def test_a_failure_on_one_host_is_shown_and_does_not_hang_the_other(pair: Hosts) -> None:
    start = time.monotonic()
    with pytest.raises(HostFailure, match="the second host is unhappy"):
        pair.run(raise_on_one_host, timeout=60.0)
    assert time.monotonic() - start < 50.0


def test_hosts_are_removed_however_the_block_ends(pair: Hosts) -> None:
    assert all(name in _namespaces() for name in pair.names)
    with pytest.raises(KeyboardInterrupt), hosts("other") as others:  # noqa: PT012
        assert all(name in _namespaces() for name in others.names)
        raise KeyboardInterrupt
    assert not any(name in _namespaces() for name in others.names)
    assert all(name in _namespaces() for name in pair.names)


def _namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=20)
    return [line.split()[0] for line in listed.stdout.splitlines()]
