"""Claims about the benchmark of the space-time model: contenders train alike, and send what their formulas say."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.netns import why_not
from benchmarks.netns_switch import switched
from benchmarks.space_time import CONTENDERS, PLANNED, measure
from benchmarks.space_time_bytes import sent_bytes_by_formula
from benchmarks.space_time_models import Sizes

pytestmark = [pytest.mark.distributed, pytest.mark.megatron, pytest.mark.timeout(120)]
SIZES = Sizes(frames=8, side=32, width=32, heads=4, depth=1)


def test_contenders_train_alike_and_send_what_their_formulas_say() -> None:
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    reason = why_not(shaped=True)
    if reason is not None:
        pytest.skip(reason)
    with switched(2) as switch:
        switch.shape(400)
        # Checks losses and gradients itself.
        ranks = switch.hosts.run(measure, SIZES, 1, timeout=90.0)
    for name in CONTENDERS:
        formula = sent_bytes_by_formula(name, SIZES, 2)
        if name in PLANNED:
            assert [rank[name].ledger for rank in ranks] == [[formula]] * 2, name
        on_wire = sum(rank[name].wire[0] for rank in ranks) / 2
        # Headers, acknowledgements, and what starts and ends a step.
        assert formula < on_wire < 1.06 * formula + 20_000, name


def test_dsp_sends_less_than_any_other_by_formula() -> None:
    deep = Sizes(frames=64, side=256, width=64, heads=16, depth=28)
    for ranks in (2, 4, 8, 16):
        dsp, *others = (sent_bytes_by_formula(name, deep, ranks) for name in CONTENDERS)
        assert dsp < min(others), ranks
