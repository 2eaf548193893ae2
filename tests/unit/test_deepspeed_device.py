"""Where the first collectives of a pipeline run: before its engine, and perhaps its script, has set a device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsp_plugin.patches.deepspeed import engine

accelerators = pytest.importorskip("deepspeed.accelerator")


@pytest.mark.parametrize(
    ("arguments", "index"),
    [(None, 3), (SimpleNamespace(local_rank=3), 3), (SimpleNamespace(local_rank=3, device_rank=5), 5)],
)
def test_the_device_is_the_engines_whatever_the_current_one(
    arguments: Any, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`DeepSpeedEngine._set_distributed_vars` has the rule; nobody has called ``torch.cuda.set_device``."""
    cuda = SimpleNamespace(device_name=lambda index=None: f"cuda:{index}", current_device_name=lambda: "cuda:0")
    monkeypatch.setattr(accelerators, "get_accelerator", lambda: cuda)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert engine.device_of(arguments) == torch.device("cuda", index)
