"""What one rank alone has to refuse is refused on all of them, before any of them waits for it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_plugin import Axis, Plan, SequenceParallelConfig, SequenceParallelGroups, Stage, ledger, parallelize
from dsp_plugin.comm.consent import go_on
from dsp_plugin.errors import CollectiveMismatchError, SequenceParallelConfigError, UnsupportedError
from dsp_plugin.spawn import spawn
from dsp_plugin.training.same_sample import CHECKED_FORWARDS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]

HEADS, WIDTH = 4, 16


class Block(nn.Module):
    """Self-attention, then attention to text that every rank holds whole."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.q, self.kv = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x_BnC: Tensor, text_BtC: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x_BnC).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x_BnC = x_BnC + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if text_BtC is None:
            return x_BnC
        q = self.q(x_BnC).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.kv(text_BtC).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return x_BnC + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """``least``: blocks after the first are left out where this rank's tokens are smaller, as caches do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.least = 0.0

    def forward(self, x_BnC: Tensor, text_BtC: Tensor | None = None) -> Tensor:
        for number, block in enumerate(self.blocks):
            if number == 1 and x_BnC.abs().mean() < self.least:
                break
            x_BnC = block(x_BnC, text_BtC)
        return x_BnC


def model(method: str, plan: Plan | None = None) -> Model:
    torch.manual_seed(0)
    found = Model().double()
    batch = {"batch": {"x_BnC": 1}, "attention": ["blocks.*"], "gather_output": 1, "positions": None}
    config = SequenceParallelConfig(method=method, size=dist.get_world_size(), quiet=True, **({} if plan else batch))
    parallelize(found, plan, config=config, groups=SequenceParallelGroups.build(config))
    return found


def example(length: int) -> Tensor:
    return torch.randn(2, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(length))


def said(run: object, *args: object) -> tuple[str, str]:
    assert callable(run)
    try:
        run(*args)
    except (SequenceParallelConfigError, UnsupportedError, CollectiveMismatchError) as error:
        return type(error).__name__, str(error)
    return "", ""


def _cross_attention(method: str) -> list[tuple[str, str]]:
    """As many text tokens as some rank has of the sequence, and as none has; then a pass that is legal."""
    size, length = dist.get_world_size(), 4 * dist.get_world_size() + 1
    found = []
    for text in (4, 5, 7):
        mine = model(method)
        mine.blocks[0](example(length), example(text))  # outside of a pass nobody asks anybody
        found.append(said(mine, example(length), example(text)))
        with ledger() as log:
            mine(example(length)).sum().backward()
        assert log.bytes(method=method) > 0
        # Each of the three calls, and the pass itself; the first was agreed on in the pass that failed, before it did.
        assert log.calls(method="agreement") == 3
        assert log.bytes(method="agreement") == 3 * 24 * (size - 1)
        with ledger() as log:
            mine(example(length)).sum().backward()
            mine(example(2 * size)).sum().backward()
        assert log.calls(method="agreement") == 1, "a pass of another length; its calls are known"
    return found


def _methods() -> dict[str, list[tuple[str, str]]]:
    return {method: _cross_attention(method) for method in ("ulysses", "ring", "lightseq")}


@pytest.mark.parametrize("size", [2, 3])
def test_cross_attention_that_looks_like_self_attention_on_some_ranks_is_refused_on_all(size: int) -> None:
    results = spawn(_methods, size, timeout=100)
    for result in results:
        assert result == results[0]
    for found in results[0].values():
        for kind, words in found:
            assert kind == "UnsupportedError"
            assert "leave cross-attention modules out" in words.lower()
            assert "Said by rank" in words


def _caches() -> list[tuple[str, str]]:
    plan = Plan(tokens="b s c", stages=tuple(Stage(f"blocks.{number}", ("b",)) for number in range(3)))
    found = []
    for least in (0.0, 1.5):
        x = example(4 * dist.get_world_size())
        mine = model("dsp", plan)
        with torch.no_grad():
            moved = mine.blocks[0](x)
        x[:, : x.shape[1] // dist.get_world_size()] *= 4.0
        mine.least = least * moved.abs().mean().item()
        found.append(said(mine, x))
        mine.least = 0.0
        found.append(said(mine, x))
    return found


def test_a_way_through_the_stages_that_hangs_on_a_ranks_own_tokens_is_refused_on_all() -> None:
    results = spawn(_caches, 2, timeout=60)
    assert results[0] == results[1]
    whole, again, parted, after = results[0]
    assert whole == again == after == ("", "")
    assert parted[0] == "SequenceParallelConfigError"
    assert "plan.stages='blocks.1': forward ended without it" in parted[1]
    assert "Said by rank 1" in parted[1]


def _lengths() -> tuple[str, str]:
    mine = model("ring")
    # While peers compare their samples, others are found before.
    for _ in range(CHECKED_FORWARDS):
        mine(example(8))
    return said(mine, example(12 + 2 * (dist.get_rank() == 1)))


def test_ranks_with_sequences_of_different_lengths_say_so() -> None:
    for kind, words in spawn(_lengths, 3, timeout=60):
        assert kind == "CollectiveMismatchError"
        assert (
            "rank 0: forward of 0 [2, 12, 16]; rank 1: forward of 0 [2, 14, 16]; rank 2: forward of 0 [2, 12" in words
        )


def _two_refuse() -> list[tuple[str, str]]:
    axis = Axis.of_group("sp", dist.group.WORLD)
    rank = dist.get_rank()
    mine = [None, UnsupportedError("no such thing: ünknown."), SequenceParallelConfigError("neither")][rank]
    found = [said(go_on, "one step", mine, axis), said(go_on, f"step {min(rank, 1)}", None, axis)]
    go_on("one step", None, axis)
    return found


def test_the_first_refusal_is_everybodys_and_other_steps_are_named() -> None:
    refused, parted = spawn(_two_refuse, 3, timeout=60)[2]
    assert refused == (
        "UnsupportedError",
        "no such thing: ünknown. (Said by rank 1 of the sequence's ranks [0, 1, 2].)",
    )
    assert parted[0] == "CollectiveMismatchError"
    assert "rank 0: step 0; rank 1: step 1; rank 2: step 1" in parted[1]


def test_alone_a_refusal_is_only_raised() -> None:
    go_on("step", None, Axis.alone("sp"))
    with pytest.raises(UnsupportedError, match=r"^why$"):
        go_on("step", UnsupportedError("why"), Axis.alone("sp"))
