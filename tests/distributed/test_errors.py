"""Wrong inputs on spawned ranks: the same error on every rank, before anything is sent, and nobody hangs.

Wrong settings, which no rank is needed for, are in `tests/unit/test_config_refused.py`.
"""

from __future__ import annotations

import time
from functools import cache

import pytest
from mistaken_batches import BATCHES
from mistaken_calls import CALLS
from mistaken_plans import PLANS
from mistakes import Groups, Mistake, config

from dsp_plugin import ledger
from dsp_plugin.spawn import spawn

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(90)]

MISTAKES: dict[str, Mistake] = {**CALLS, **BATCHES, **PLANS}
Outcome = tuple[str, str, int, float]


def _make_all_mistakes() -> dict[str, Outcome]:
    """Error, message, collectives entered and seconds, of each mistake on this rank."""
    groups = Groups.build(config())
    outcomes = {}
    for name, mistake in MISTAKES.items():
        start = time.monotonic()
        error, message = "nothing", ""
        with ledger() as log:
            try:
                mistake.make(groups)
            except Exception as raised:
                error, message = type(raised).__name__, str(raised)
        outcomes[name] = error, message, log.calls(), time.monotonic() - start
    return outcomes


@cache
def outcomes_by_rank(size: int) -> list[dict[str, Outcome]]:
    return spawn(_make_all_mistakes, size, timeout=45.0)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", MISTAKES)
def test_every_rank_gets_the_same_error_and_sends_nothing(name, size):
    mistake = MISTAKES[name]
    by_rank = [outcomes[name] for outcomes in outcomes_by_rank(size)]
    for error, message, calls, seconds in by_rank:
        assert error == mistake.error.__name__, message
        for part in mistake.parts:
            assert part in message, message
        assert calls == by_rank[0][2]
        assert mistake.late or calls == 0
        assert seconds < 5
    if not mistake.late and name not in RANK_IN_TEXT:
        assert len({message for _, message, *_ in by_rank}) == 1


# Their messages tell what this rank holds, which differs where the length does not divide.
RANK_IN_TEXT = {
    "unsharded tokens",
    "too few tokens",
    "cross-attention",
    "values of other tokens",
    "other batch of keys",
    "other head dim of keys",
    "tensors without heads",
    "switch of a wrong length",
    "switch from the whole dim",
    "switch to no dim",
    "gather of no dim",
    "gather of a wrong length",
    "cross-attention in a routed module",
    "grouped heads without enable_gqa",
    "attention without a head dim",
    "dense mask",
}


def test_more_than_forty_mistakes():
    assert len(MISTAKES) >= 40
