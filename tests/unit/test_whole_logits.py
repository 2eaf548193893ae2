"""Logits that are gathered where they are read: by every way to read them, once, and by nothing else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from transformers.modeling_outputs import CausalLMOutputWithPast

from dsp_plugin.patches.transformers.whole_logits import gathered_when_read, nobody_reads

LOCAL = torch.arange(6.0).view(1, 2, 3)
WHOLE = torch.cat([LOCAL, LOCAL + 10], 1)


class Gather:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, local: Tensor) -> Tensor:
        assert local is LOCAL
        self.calls += 1
        return WHOLE


def made() -> tuple[Any, Gather]:
    """An output with a loss, and what makes its logits whole."""
    gather = Gather()
    return gathered_when_read(CausalLMOutputWithPast(loss=torch.tensor(2.0), logits=LOCAL), gather), gather


READ: dict[str, Callable[[Any], Tensor]] = {
    "attribute": lambda output: output.logits,
    "getattr": lambda output: getattr(output, "logits", None),
    "key": lambda output: output["logits"],
    "get": lambda output: output.get("logits"),
    "index": lambda output: output[1],
    "from the end": lambda output: output[-1],
    "slice": lambda output: output[1:][0],
    "items": lambda output: dict(output.items())["logits"],
    "values": lambda output: list(output.values())[1],
    "dict": lambda output: dict(output)["logits"],
    "keywords": lambda output: dict(**output)["logits"],
    "tuple": lambda output: output.to_tuple()[1],
    "copy": lambda output: copy.deepcopy(output).logits,
    "pickle": lambda output: pickle.loads(pickle.dumps(output)).logits,
}


@pytest.mark.parametrize("way", READ)
def test_whoever_reads_logits_gets_whole_ones(way: str) -> None:
    output, gather = made()
    for _ in range(2):
        torch.testing.assert_close(READ[way](output), WHOLE)
    assert gather.calls == 1


def test_whoever_reads_the_loss_alone_gathers_nothing() -> None:
    output, gather = made()
    assert isinstance(output, CausalLMOutputWithPast)
    assert isinstance(output, dict)
    assert output.loss == output["loss"] == output[0] == output.get("loss") == 2
    assert "loss" in output
    assert list(output.keys()) == ["loss", "logits"]
    assert len(output) == 2
    assert output.get("hidden_states") is None
    assert output.hidden_states is None
    assert gather.calls == 0


def test_what_is_written_is_read() -> None:
    output, gather = made()
    output.logits = LOCAL + 1
    torch.testing.assert_close(output["logits"], LOCAL + 1)
    output["logits"] = LOCAL + 2
    torch.testing.assert_close(output.logits, LOCAL + 2)
    output.loss = torch.tensor(3.0)
    assert output[0] == 3
    assert gather.calls == 0


def test_a_tuple_is_made_whole_at_once() -> None:
    loss, logits, rest = gathered_when_read((torch.tensor(2.0), LOCAL, "rest"), Gather())
    assert (loss, rest) == (2, "rest")
    torch.testing.assert_close(logits, WHOLE)


def test_where_nobody_reads_nothing_is_gathered() -> None:
    with nobody_reads():
        output, gather = made()
    assert output.logits is LOCAL
    assert gather.calls == 0
