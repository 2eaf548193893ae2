"""Diffusers' Wan, unmodified, with Ulysses, a ring or both inside: the output, every gradient, the planned bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import Case, assert_parity
from torch import nn

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError, SequenceParallelGroups, parallelize
from dsp_plugin.errors import UnsupportedError
from dsp_plugin.patches.diffusers import cogvideox, wan
from dsp_plugin.spawn import spawn

# 5 frames of 3 x 3 patches: 45 tokens, which 2 and 4 do not divide. 7 frames: 63.
SMALL: dict[str, Any] = {"height": 6, "width": 6, "channels": 3, "head_dim": 12, "caption_channels": 5, "batch": 2}


def built(times: str = "videos", recompute: bool = False, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Wan and one call.

    Args:
        times: one for each of the ``videos``, or of the ``tokens`` (Wan 2.2).
        recompute: by diffusers' own gradient checkpointing.
    """
    model, kwargs = wan.subject(**{**SMALL, **settings})
    if times == "tokens":
        batch, _, frames, height, width = kwargs["hidden_states"].shape
        kwargs["timestep"] = torch.randint(1000, (batch, frames * height * width // 4))
    if recompute:
        model.enable_gradient_checkpointing()
    return model.train(), kwargs


def case(config: dict[str, Any], counted: bool = True, **settings: Any) -> Case:
    # Wan itself computes in fp32 here and there, whatever the dtype of its weights.
    return Case(built, settings, config=config, dtype=torch.float32, counted=counted)


USP = {"method": "usp", "ulysses_size": 2, "ring_size": 2}


def cases(size: int, everything: bool) -> dict[str, tuple[Case, str]]:
    """By name: the case, and what serves its blocks."""
    heads = 3 if size == 3 else 4
    found = {
        # No dim is free of attention, so there is nothing to switch to.
        "dsp": (case({"method": "dsp"}, heads=heads), "ulysses"),
        "ulysses": (case({"method": "ulysses"}, heads=heads, caption=3, batch=1), "ulysses"),
        "ring": (case({"method": "ring"}, heads=5), "ring"),
        "times of tokens": (case({"method": "ulysses"}, heads=heads, times="tokens"), "ulysses"),
        "recompute": (case({"method": "ulysses"}, counted=False, heads=heads, recompute=True), "ulysses"),
        "usp": (case(USP, heads=2), "usp"),
        "usp, times of tokens": (case(USP, heads=2, times="tokens", frames=7), "usp"),
    }
    always = {2: ("dsp", "recompute"), 3: ("ring", "times of tokens"), 4: ("ulysses", "usp, times of tokens")}
    fits = [name for name in found if size == 4 or not name.startswith("usp")]
    return {name: found[name] for name in fits if everything != (name in always[size])}


def _hold(size: int, everything: bool) -> None:
    wanted = cases(size, everything)
    results = assert_parity(size, *(case for case, _ in wanted.values()))
    for (name, (_, inside)), result in zip(wanted.items(), results, strict=True):
        # Tokens are gathered as pixels where one modulation is for all of them.
        ends = [] if name.endswith("times of tokens") else ["local"]
        assert [stage[-1] for stage in result.stages] == [inside, inside, *ends], f"{name}: {result.stages}"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sharded_wan_has_the_unsharded_output_gradients_and_the_planned_bytes(size):
    _hold(size, everything=False)


@pytest.mark.matrix
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_same_of_every_case_at_every_number_of_ranks(size):
    _hold(size, everything=True)


def _heads(size: int) -> str:
    config = SequenceParallelConfig(method="dsp", size=size)
    model, kwargs = built(heads=1)
    parallelize(model, config=config, groups=SequenceParallelGroups.build(config))
    with pytest.raises(SequenceParallelConfigError) as caught:
        model(**kwargs)
    return str(caught.value)


def test_fewer_heads_than_ranks_are_refused_alike_on_every_rank():
    (message,) = set(spawn(_heads, 2, 2))
    assert "heads" in message
    assert "blocks.0" in message


def test_a_model_that_joins_text_and_video_in_attention_is_refused_with_the_reason():
    with pytest.raises(UnsupportedError, match="join them inside attention"):
        cogvideox.plan(nn.Linear(2, 2))
