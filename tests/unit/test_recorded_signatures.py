"""What we call in flash-linear-attention takes what we pass, by the signatures of its sources.

Those of flash-attn are bound by the stand-ins of test_kernels_windowed and test_kernels_segments at every call, torch's
own by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded_signatures import FLA, FLASH_ATTENTION_2, FLASH_ATTENTION_3, Recorded
from test_linear_fla import BATCH, HEADS, KEY_DIM, VALUE_DIM, example
from torch import Tensor

from dsp_plugin.kernels import linear_fla
from dsp_plugin.kernels.linear import DECAYS, linear_attention
from dsp_plugin.kernels.linear_fla import Operators

pytestmark = pytest.mark.timeout(60)


def bound(recorded: Recorded, name: str, passed: set[str]) -> Callable[..., tuple[Tensor, Tensor]]:
    """An operator with the recorded signature, all of whose results are 0."""
    signature = recorded.python(name)

    def operator(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        given = signature.bind(*arguments, **keywords).arguments
        # What has no parameter of its own would be swallowed.
        assert not given.get("kwargs")
        passed.add(name)
        q, v = given["q"], given["v"]
        depends = sum(x.sum() for x in given.values() if isinstance(x, Tensor) and x.is_floating_point()) * 0
        out, state = (
            torch.zeros(*v.shape) + depends,
            torch.zeros(len(q), v.shape[2], q.shape[-1], v.shape[-1]) + depends,
        )
        return out.to(v.dtype), state

    return operator


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("recorded", FLA, ids=str)
def test_fla_takes_what_is_passed(recorded: Recorded, decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: set[str] = set()
    found = Operators(*(bound(recorded, name, passed) for name in Operators._fields))
    monkeypatch.setattr(linear_fla, "unusable", lambda *_: None)
    monkeypatch.setattr(linear_fla, "operators", lambda: found)
    inputs = example(decay)
    out, state = linear_attention(**inputs, kernel="fla", output_final_state=True)
    assert state.shape == (BATCH, HEADS, KEY_DIM, VALUE_DIM)
    (out.sum() + state.sum()).backward()
    assert len(passed) == 1


def test_every_operator_that_we_call_is_recorded() -> None:
    for recorded in FLA:
        assert tuple(recorded.signatures) == Operators._fields
    varlen = {f"_flash_attn_{kind}{way}" for kind in ("", "varlen_") for way in ("forward", "backward")}
    for recorded in FLASH_ATTENTION_2:
        assert recorded.signatures.keys() == varlen
    for recorded in FLASH_ATTENTION_3:
        assert recorded.signatures.keys() == {"fwd", "bwd"}
