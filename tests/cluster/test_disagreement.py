"""Ranks that do not fit together end when a collective has taken as long as it may, and say who or how to learn who."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from failing_ranks import ranks

from dsp_plugin.watch.last_words import STATUS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

SCRIPT = Path(__file__).with_name("disagreeing_script.py")
LIMIT = 3.0
"""Seconds that the script gives a collective. The watch's and torch's own would outlast the test's patience."""
HINT = "DSP_PLUGIN_DEBUG=1"
ABORT = -signal.SIGABRT
FINISHED = (0, 1, STATUS, ABORT)


SCRIPT_ENDED = r"rank 1 \(host \S+, pid \d+\) is gone: its script ended by ValueError: the learning rate is blue"
ENDED = r"rank 1 \(host \S+, pid \d+\) is gone: its process ended without a word"

# Which of the ranks gloo ends, and how, depends on what each of them happens to wait for.
KINDS: dict[str, tuple[tuple[int, ...], str]] = {
    "shape": (FINISHED, HINT),
    "dtype": (FINISHED, HINT),
    "order": (FINISHED, HINT),
    "absence": (FINISHED, HINT),
    "method": (FINISHED, HINT),
    "length": (FINISHED, HINT),
    "heads": (FINISHED, HINT),
    "config": (FINISHED, HINT),
    "error": ((1, STATUS), SCRIPT_ENDED),
    "death": ((7, STATUS), ENDED),
    "hang": ((1, STATUS), HINT),
}
SLOW = ("order", "config")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.matrix] if kind in SLOW else []) for kind in KINDS]
)
def test_ranks_that_disagree_end_and_say_how_to_learn_why(kind: str, tmp_path: Path) -> None:
    statuses, words = KINDS[kind]
    with ranks(tmp_path, 2, str(LIMIT), kind, timeout=200.0, script=SCRIPT) as world:
        ended = world.statuses(0, 1)
        assert set(ended) <= set(statuses), world.outputs()
        assert any(ended), "nobody noticed"
        assert re.search(words, world.outputs()), world.outputs()
        for rank in (0, 1):
            assert world.output(rank).count(HINT) <= 1, world.output(rank)


@pytest.mark.matrix
def test_a_stopped_rank_is_named_when_a_collective_has_timed_out(tmp_path: Path) -> None:
    """Long before the watch's own timeout: all are asked whether they are there."""
    with ranks(tmp_path, 3, timeout=200.0, script=SCRIPT.with_name("exchanging_script.py"), limit=LIMIT) as world:
        world.under_way()
        world.send(1, signal.SIGSTOP)
        assert world.statuses(0, 2) == [STATUS] * 2, world.outputs()
        for rank in (0, 2):
            assert re.search(r"rank 1 \(host \S+, pid \d+\) is gone: it has been silent for", world.output(rank))
