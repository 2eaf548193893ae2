"""Two kinds of tokens in one attention, as text behind a video: what cannot serve them names what can."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from attending import Layer
from torch import Tensor, nn

from dsp_plugin import (
    Plan,
    SequenceParallelConfig,
    SequenceParallelConfigError,
    SequenceParallelGroups,
    Stage,
    parallelize,
)
from dsp_plugin.spawn import spawn

WIDTH, HEADS, VIDEO, TEXT = 12, 3, 7, 3


class Model(nn.Module):
    def __init__(self, text_first: bool) -> None:
        super().__init__()
        self.blocks, self.text_first = nn.ModuleList(Layer(WIDTH, HEADS, causal=False) for _ in range(2)), text_first

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = torch.cat([text, video] if self.text_first else [video, text], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, TEXT:] if self.text_first else x[:, :VIDEO]


def plan(tokens: str, layout: str) -> Plan:
    along = (tokens.split()[1],)
    return Plan(tokens, (Stage("blocks.*", along, layout=layout, attention="attn", heads=HEADS),), sizes={"k": TEXT})


def errors(method: str) -> dict[str, Any]:
    """What is said of patterns with further tokens, and how far off the pattern is that is then named."""
    found: dict[str, Any] = {}
    config = SequenceParallelConfig(method=method, size=dist.get_world_size(), quiet=True)
    draw = torch.Generator().manual_seed(1)
    given = [torch.randn(2, n, WIDTH, generator=draw, dtype=torch.float64) for n in (VIDEO, TEXT)]
    for text_first, layout in (
        (True, f"b {TEXT}+s c"),
        (False, f"b s+{TEXT} c"),
        (False, "b s+k c"),
        (True, "b k+s c"),
    ):
        torch.manual_seed(0)
        whole = Model(text_first).double()
        wanted = whole(*given)
        wanted.square().sum().backward()
        for name, described in ((layout, plan("b s c", layout)), (f"remedy of {layout}", plan("b n c", "b n c"))):
            torch.manual_seed(0)
            model = Model(text_first).double()
            parallelize(model, described, config=config, groups=SequenceParallelGroups.build(config))
            try:
                out = model(*given)
            except SequenceParallelConfigError as error:
                found[name] = str(error)
                continue
            out.square().sum().backward()
            worst = (out - wanted).abs().max().item()
            for parameter, other in zip(model.parameters(), whole.parameters(), strict=True):
                dist.all_reduce(parameter.grad)
                error = parameter.grad / config.size - other.grad
                worst = max(worst, (error.abs().max() / other.grad.abs().max()).item())
            found[name] = worst
    return found


@pytest.mark.parametrize("method", ["ring", pytest.param("ulysses", marks=pytest.mark.matrix)])
def test_joint_attention_is_told_the_pattern_that_serves_it(method: str) -> None:
    for found in spawn(errors, 3, method):
        assert len(found) == 8
        for name, outcome in found.items():
            if name.startswith("remedy"):
                assert outcome < 1e-10, (name, outcome)
            else:
                assert "beside its part of s, and attend to them P times" in outcome, (name, outcome)
                assert 'tokens="b n c"' in outcome, outcome
                assert "ame the stage's attention modules" not in outcome
