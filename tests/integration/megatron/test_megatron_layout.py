"""Contiguous order: every place where Megatron cuts a sequence, and what is refused with it."""

from __future__ import annotations

import pytest
from layout_workers import cuts, early_importer, refused

from dsp_plugin.spawn import spawn

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def found() -> list[dict[str, bool]]:
    """What each of three ranks found."""
    return spawn(cuts, 3, timeout=150)


@pytest.mark.parametrize("place", ["tokens", "attention mask", "nothing", "rotary", "yarn", "roll", "one rank"])
def test_cut_is_contiguous(place: str, found: list[dict[str, bool]]) -> None:
    assert [ranks[place] for ranks in found] == [True] * 3


@pytest.fixture(scope="module")
def errors() -> list[dict[str, str]]:
    """The errors on each of two ranks."""
    return spawn(refused, 2, timeout=150)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("uneven", ["SequenceParallelConfigError", "25 tokens / 2 context-parallel ranks leaves 1", "multiple of 2"]),
        ("layer", ["UnsupportedError", "'GatedDeltaNet'", "zigzag order"]),
        ("striped", ["SequenceParallelConfigError", "'striped'", "zigzag or contiguous"]),
        ("zigzag", ["SequenceParallelConfigError", "'zigzag'", "lightseq takes contiguous"]),
    ],
)
def test_what_does_not_fit_is_refused_on_every_rank(case: str, words: list[str], errors: list[dict[str, str]]) -> None:
    messages = {rank[case] for rank in errors}
    assert len(messages) == 1, f"ranks disagree: {messages}"
    (message,) = messages
    assert all(word in message for word in words), message


def test_who_imported_a_slicer_too_early_is_named() -> None:
    (found,) = spawn(early_importer, 1, timeout=100)
    assert found["ring"] == ""
    assert all(word in found["lightseq"] for word in ("PatchError", "users_script imported", "dsp_plugin.launch"))
