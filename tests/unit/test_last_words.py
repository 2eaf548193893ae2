"""What is said of a rank that is gone is what is known, with the way to learn more where ranks may have disagreed."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from dsp_plugin.comm import agreement
from dsp_plugin.errors import CollectiveMismatchError
from dsp_plugin.watch.last_words import Gone, Latest, report, without_a_word

UNKNOWN = (
    "its process ended without a word, killed (SIGKILL, out of memory), crashed or aborted: its own output may say"
)
HINT = "run again with DSP_PLUGIN_DEBUG=1"


@pytest.fixture(autouse=True)
def no_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_entered", {})


@pytest.mark.parametrize(
    ("command", "words", "hinted"),
    [
        (
            "kill -KILL $$",
            "its process ended without a word: SIGKILL, by somebody's hand or because memory ran out",
            False,
        ),
        ("kill -ABRT $$", "its process ended without a word: SIGABRT, as gloo and NCCL do when ranks send", True),
        ("kill -SEGV $$", "its process ended without a word: SIGSEGV", True),
        ("kill -40 $$", "its process ended without a word: signal 40", True),
        ("exit 3", "its process ended without a word, with exit status 3", True),
        ("exit 0", "its process ended without a word, with exit status 0", True),
    ],
)
def test_how_a_process_ended_is_told_while_the_kernel_knows(command: str, words: str, hinted: bool) -> None:
    process = subprocess.Popen(["/bin/bash", "-c", command])
    try:
        # It has ended; that it is still to be waited for is how its status is to be had.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        how = without_a_word(process.pid, here=True)
        assert how.startswith(words)
        assert without_a_word(process.pid, here=False).startswith(UNKNOWN)
    finally:
        process.wait()
    # Its parent knows now, and nobody else.
    assert without_a_word(process.pid, here=True).startswith(UNKNOWN)
    assert (HINT in report(1, Gone(0, "host", 7, how), Latest(), None)) == hinted


def test_a_process_that_lives_has_no_status() -> None:
    assert without_a_word(os.getpid(), here=True).startswith(UNKNOWN)


@pytest.mark.parametrize(
    ("how", "hinted"),
    [
        (UNKNOWN, True),
        ("its script ended by RuntimeError: Timed out waiting 3000ms for send operation to complete", True),
        ("its script ended by RuntimeError: Connection closed by peer [127.0.0.1]:2", True),
        ("its script ended by ValueError: the learning rate is blue", False),
        ("it was terminated (SIGTERM)", False),
        ("it has been silent for 300.2 s", False),
    ],
)
def test_the_hint_is_given_where_ranks_may_have_disagreed(
    how: str, hinted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Gone(0, "host", 7, how)
    assert (HINT in report(1, gone, Latest(), None)) == hinted
    monkeypatch.setattr(agreement, "_entered", {"dsp_plugin/0-1": 3})
    assert HINT not in report(1, gone, Latest(), None), "debug mode is on"


def test_an_error_of_a_collective_tells_how_to_learn_more_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(RuntimeError, match=r"^Connection closed\n.*_DEBUG=1") as raised,
        agreement.explained(),
    ):
        raise RuntimeError("Connection closed")
    assert [HINT in note for note in raised.value.__notes__] == [True]
    gone = Gone(0, "host", 7, "its script ended by RuntimeError: Connection closed by peer")
    assert len(re.findall(HINT, report(1, gone, Latest(), raised.value))) == 1
    for error in (CollectiveMismatchError("ranks differ"), ValueError("mine")):
        with pytest.raises(type(error)) as other, agreement.explained():
            raise error
        assert not hasattr(other.value, "__notes__")
    monkeypatch.setattr(agreement, "_entered", {"dsp_plugin/0-1": 3})
    with pytest.raises(RuntimeError) as checked, agreement.explained():
        raise RuntimeError("Connection closed")
    assert not hasattr(checked.value, "__notes__")
