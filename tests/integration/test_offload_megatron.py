"""``--sp-memory '{"offload": true}'`` in real Megatron-core: steps are the same to the bit, whatever it recomputes."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from deferred_copies import copies_of, settings_defer
from test_recompute_megatron import PLAIN, PP2, TP2, Case, name, train

from dsp_plugin import UnsupportedError
from dsp_plugin.spawn import spawn

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.timeout(280),
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"),
]

OFFLOAD = '{"offload": true}'
COVERING = [
    replace(PLAIN["ulysses", PP2], granularity="uniform"),
    replace(PLAIN["ulysses", TP2], granularity="uniform", recompute="keep_attention", distribute=True),
]
MATRIX = [
    replace(PLAIN[method, parallel], granularity=granularity, recompute=recompute, distribute=distribute, dropout=0.2)
    for method, parallel, granularity, distribute in (
        ("ulysses", PP2, "block", False),
        ("ulysses", PP2, "selective", False),
        ("ring", PP2, "uniform", False),
        ("ring", TP2, "selective", False),
        ("ring", TP2, "uniform", True),
    )
    for recompute in ("full", "keep_attention")
]


def run(cases: list[Case]) -> list[dict[str, Any]]:
    """Each case without and with an offload: what is the same of it on this rank, and what the offload did."""
    from dsp_plugin.patches import cpu

    cpu.install()
    found = []
    for case in cases:
        without = train(case)
        with settings_defer() as made:
            offloaded = train(replace(case, memory=OFFLOAD))
        (offload,) = made
        counts, gradients = offload.counts(), without["gradients"]
        found.append(
            {
                "moved": counts.moved > 0,
                "faults": copies_of(offload).faults,
                "left": (counts.host, counts.device),
                "losses": offloaded["losses"] == without["losses"],
                "computed and sent": offloaded["forward"] == without["forward"],
                "gradients": [
                    name for name in gradients if not torch.equal(offloaded["gradients"][name], gradients[name])
                ],
            }
        )
    return found


SAME = {"moved": True, "faults": [], "left": (0, 0), "losses": True, "computed and sent": True, "gradients": []}


@pytest.mark.parametrize(
    "cases",
    [
        COVERING,
        *(
            pytest.param([case for case in MATRIX if case.recompute == recompute], marks=pytest.mark.matrix)
            for recompute in ("full", "keep_attention")
        ),
    ],
    ids=["covering", "full", "keep_attention"],
)
def test_a_step_is_the_same_to_the_bit(cases: list[Case]) -> None:
    for rank in spawn(run, 4, cases, timeout=260):
        assert dict(zip(map(name, cases), rank, strict=True)) == dict.fromkeys(map(name, cases), SAME)


def refused() -> list[str]:
    """What is said where nothing is recomputed, by a schedule with a pipeline and one without."""
    from dsp_plugin.patches import cpu

    cpu.install()
    said = []
    for parallel in ("", PP2):
        try:
            train(Case("ulysses", parallel, memory=OFFLOAD))
        except UnsupportedError as error:
            said.append(str(error))
    return said


def test_where_nothing_is_recomputed_it_is_refused_on_every_rank() -> None:
    for said in spawn(refused, 4, timeout=200):
        assert len(said) == 2
        assert all("recompute_granularity is None" in words for words in said)
