"""Claims about a rank on each of several hosts: exchanges of states are exact, and send what the ledger counts."""

from __future__ import annotations

import subprocess
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks.netns import sent_bytes, why_not
from benchmarks.netns_switch import switched
from dsp_plugin import Layout, SequenceParallelConfig, SequenceParallelGroups
from dsp_plugin.comm import ledger
from dsp_plugin.kernels.linear import linear_attention
from dsp_plugin.methods import lasp
from dsp_plugin.methods.method import Where
from dsp_plugin.methods.state_exchange import EXCHANGES

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]
HOSTS = 3


@pytest.fixture(autouse=True)
def permitted() -> None:
    reason = why_not(shaped=True)
    if reason is not None:
        pytest.skip(reason)


def attend_on_host() -> dict[str, dict[str, float]]:
    """By exchange: the greatest error of out and gradients, and bytes by the ledger and by the interface."""
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(1, 301, 16, 64, generator=generator, dtype=torch.float64) for _ in range(4)]
    *inputs, dout = whole
    inputs = [x.requires_grad_() for x in inputs]
    expected = linear_attention(*inputs)
    wanted = (expected, *torch.autograd.grad(expected, inputs, dout))

    groups = SequenceParallelGroups.build(SequenceParallelConfig(method="lasp", size=HOSTS))
    layout = Layout("contiguous", 301, HOSTS)
    shards = [layout.shard(x.detach(), 1, groups.sp.rank).clone().requires_grad_() for x in inputs]
    found = {}
    for exchange in EXCHANGES:
        dist.barrier()
        before = sent_bytes()
        with ledger() as log:
            out = lasp.attention(*shards, where=Where(groups, layout), exchange=exchange)
            got = (out, *torch.autograd.grad(out, shards, layout.shard(dout, 1, groups.sp.rank)))
        dist.barrier()
        on_wire = sent_bytes() - before
        errors = [(x - layout.shard(y, 1, groups.sp.rank)).abs().max() for x, y in zip(got, wanted, strict=True)]
        found[exchange] = {"error": torch.stack(errors).max().item(), "ledger": log.bytes(), "wire": on_wire}
    return found


def test_states_cross_hosts_exactly_and_the_interfaces_count_what_the_ledger_counts():
    with switched(HOSTS) as switch:
        switch.shape(400)
        ranks = switch.hosts.run(attend_on_host, timeout=60.0)
    state = 16 * 64 * 64 * 8
    for exchange in EXCHANGES:
        assert max(rank[exchange]["error"] for rank in ranks) < 1e-10
        by_ledger, on_wire = (sum(rank[exchange][count] for rank in ranks) for count in ("ledger", "wire"))
        # Two passes; every rank sends to all, or all but one to the next.
        assert by_ledger == 2 * state * (HOSTS - 1) * (HOSTS if exchange == "allgather" else 1)
        # Headers and acknowledgements come on top, nothing else.
        assert 1.0 < on_wire / by_ledger < 1.08


def rate_from_others() -> float:
    """Mbit/s that arrive at the first host, to which all others send at once; 0 elsewhere."""
    payload = [torch.zeros(2**20, dtype=torch.uint8) for _ in range(dist.get_world_size() - 1)]
    dist.barrier()
    start = time.perf_counter()
    if dist.get_rank():
        dist.send(payload[0], 0)
        return 0.0
    for arriving in [dist.irecv(x, rank + 1) for rank, x in enumerate(payload)]:
        arriving.wait()
    return len(payload) * 2**20 * 8 / 1e6 / (time.perf_counter() - start)


def test_what_a_host_receives_is_shaped_too():
    with switched(HOSTS) as switch:
        switch.shape(100)
        rate = switch.hosts.run(rate_from_others, timeout=60.0)[0]
    assert 50 < rate < 115


def test_hosts_and_switch_are_removed_however_the_block_ends():
    def namespaces() -> str:
        return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True, timeout=20).stdout

    with pytest.raises(KeyboardInterrupt), switched(HOSTS) as switch:  # noqa: PT012
        assert all(name in namespaces() for name in (*switch.hosts.names, switch.name))
        raise KeyboardInterrupt
    assert not any(name in namespaces() for name in (*switch.hosts.names, switch.name))
