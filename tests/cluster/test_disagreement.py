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


IN_DEBUG_MODE = {
    "shape": r"disagree on the shapes before sharding\. ranks \[0\]: \[\(2, 8, 6\)\]; ranks \[1\]: \[\(3, 8, 6\)\]",
    "dtype": r"disagree on the dtype\. ranks \[0\]: torch\.float32; ranks \[1\]: torch\.bfloat16",
    "order": r"disagree on the op\. ranks \[0\]: all_gather by test in forward; ranks \[1\]: all_to_all by test",
    "absence": r"ranks \[1\] did not arrive within 3 s",
    "method": r"disagree on the op\. ranks \[0\]: all_to_all by ulysses in forward; ranks \[1\]: ring_hop by ring",
    "length": r"disagree on the shapes before sharding\. ranks \[0\]: \[\(1, 8, 4, 8\).*ranks \[1\]: \[\(1, 12, 4, 8\)",
    "heads": r"disagree on the shapes before sharding\. ranks \[0\]: \[\(1, 8, 4, 8\).*ranks \[1\]: \[\(1, 8, 8, 8\)",
    "config": r"disagree on the op\. ranks \[0\]: all_to_all by usp in forward; ranks \[1\]: ring_hop by usp",
    "hang": r"ranks \[1\] did not arrive within 3 s",
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.matrix] if kind != "hang" else []) for kind in IN_DEBUG_MODE]
)
def test_the_hint_leads_to_who_it_is(kind: str, tmp_path: Path) -> None:
    """Debug mode waits no longer than the script lets a collective wait."""
    with ranks(tmp_path, 2, str(LIMIT), kind, timeout=200.0, script=SCRIPT, DSP_PLUGIN_DEBUG="1") as world:
        ended = world.statuses(0, 1)
        assert set(ended) <= {0, 1, STATUS}, world.outputs()
        assert any(ended), "nobody noticed"
        assert re.search(IN_DEBUG_MODE[kind], world.outputs()), world.outputs()
        assert HINT not in world.outputs()


@pytest.mark.matrix
def test_a_stopped_rank_is_named_when_a_collective_has_timed_out(tmp_path: Path) -> None:
    """Long before the watch's own timeout: all are asked whether they are there."""
    script = SCRIPT.with_name("exchanging_script.py")
    with ranks(tmp_path, 3, timeout=200.0, script=script, COLLECTIVE_SECONDS=str(LIMIT)) as world:
        world.under_way()
        world.send(1, signal.SIGSTOP)
        assert world.statuses(0, 2) == [STATUS] * 2, world.outputs()
        for rank in (0, 2):
            assert re.search(r"rank 1 \(host \S+, pid \d+\) is gone: it has been silent for", world.output(rank))
