"""The axes beside Megatron-core's own groups, from install to uninstall, and the settings that never get that far."""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

import pytest
from megatron_workers import grid_of, life_of_the_groups, refused_initializations, unsupported_version

from dsp_plugin.spawn import spawn

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def lives() -> list[dict[str, Any]]:
    """What each of four ranks saw."""
    return spawn(life_of_the_groups, 4, timeout=150)


def test_axes_lie_on_the_context_parallel_ranks(lives: list[dict[str, Any]]) -> None:
    for seen in lives:
        rank = seen["rank"]
        context = [rank % 2, rank % 2 + 2]
        assert seen["context"] == context
        for axis in ("ulysses", "dsp", "lasp"):
            assert seen[axis] == (context, 2, rank // 2)
        assert seen["ring"] == ([rank], 1, 0), "an axis of one rank must be a group of one rank, not the world"
        assert seen["sum"] == sum(context)
        assert seen["again"] == [0, 1, 2, 3]


def test_axes_live_as_long_as_megatrons_groups(lives: list[dict[str, Any]]) -> None:
    for seen in lives:
        assert seen["early"] == seen["late"] == "AssertionError: ulysses parallel group is not initialized"


def test_the_first_rank_says_that_the_plugin_is_at_work(lives: list[dict[str, Any]]) -> None:
    line, *others = [seen["said"] for seen in lives]
    expected = (
        f"dsp_plugin {metadata.version('dsp-plugin')} | ulysses over 2 ranks (U 2 x R 1, adjacent) | "
        "batches of text zigzag | "
        f"kernel cpu_flash, else math | recompute full | patched megatron-core {metadata.version('megatron-core')} "
    )
    assert line.startswith(expected)
    assert re.fullmatch(r"\(\d\d patches\), torch \S+ \(1 patch\)\n", line.removeprefix(expected))
    assert others == ["", "", ""]


def test_install_is_idempotent_and_exclusive(lives: list[dict[str, Any]]) -> None:
    for seen in lives:
        assert seen["same state"]
        assert "already patched" in seen["other settings"]
        assert "uninstall()" in seen["other settings"]
        assert "exist already" in seen["after initialization"]


def test_uninstall_leaves_megatron_as_it_was(lives: list[dict[str, Any]]) -> None:
    for seen in lives:
        assert seen["restored"]
        assert seen["left"] == []


@pytest.mark.parametrize(("order", "near", "far"), [("adjacent", "ulysses", "ring"), ("strided", "ring", "ulysses")])
def test_usp_axes_lie_near_or_far_as_set(order: str, near: str, far: str) -> None:
    for rank, (ulysses, ring, said) in enumerate(spawn(grid_of, 4, order, timeout=100)):
        first = rank // 2 * 2
        assert {"ulysses": ulysses, "ring": ring} == {near: [first, first + 1], far: [rank % 2, rank % 2 + 2]}
        assert not said


@pytest.fixture(scope="module")
def refused() -> list[dict[str, str]]:
    """The errors on each of four ranks."""
    return spawn(refused_initializations, 4, timeout=150)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("world", ["= 3 does not divide the 4 ranks", "context"]),
        ("world with tp", ["tensor_model_parallel_size", "= 8 does not divide the 4 ranks"]),
        ("factors", ["4 * 1 = 4, not 2"]),
        ("hierarchy", ["hierarchical_context_parallel_sizes=[2, 2]", "[4, 1]"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_any_group(
    case: str, words: list[str], refused: list[dict[str, str]]
) -> None:
    messages = {errors[case] for errors in refused}
    assert len(messages) == 1, f"ranks disagree: {messages}"
    (message,) = messages
    assert message.startswith("SequenceParallelConfigError: ")
    assert "(initialized)" not in message
    assert all(word in message for word in words), message


def test_unsupported_megatron_is_named_and_left_alone() -> None:
    (found,) = spawn(unsupported_version, 1, "0.21.0", False, timeout=100)
    words = (
        "PatchError: ",
        "megatron-core 0.21.0",
        ">=0.16.1,<0.20",
        "nothing was patched",
        "DSP_PLUGIN_ALLOW_UNTESTED=1",
    )
    assert all(word in found["message"] for word in words), found["message"]
    assert not found["patched"]


def test_unsupported_megatron_can_be_tried() -> None:
    (found,) = spawn(unsupported_version, 1, "0.21.0", True, timeout=100)
    assert found == {"message": "", "patched": True}
