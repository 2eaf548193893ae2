"""Diffusers' Latte, unmodified, sharded by its plan: the output, every gradient, the bytes of the stage table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parity import Case, assert_parity
from torch import nn

from dsp_plugin import SequenceParallelConfig, SequenceParallelConfigError, SequenceParallelGroups, parallelize
from dsp_plugin.patches.diffusers import latte
from dsp_plugin.spawn import spawn

FRAMES, TOKENS = 7, 6
# 7 or 5 frames of 3 x 3 patches: 2 and 4 divide neither, 3 not the frames.
SMALL: dict[str, Any] = {"frames": FRAMES, "side": 6, "channels": 3, "head_dim": 4, "caption_channels": 5, "batch": 2}


def built(
    mask: str | None = None,
    temporal: bool = True,
    recompute: bool = False,
    times: str = "each",
    **settings: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Latte and one call.

    Args:
        mask: of the last tokens of every video, as ``rows`` [B * T, M], ``bias`` [B * T, 1, M] or ``videos`` [B, M].
        temporal: whether time blocks run.
        recompute: by diffusers' own gradient checkpointing.
        times: ``each`` video has its own, or ``same`` as pipelines pass it.
    """
    settings = {**SMALL, "caption": TOKENS, **settings}
    model, kwargs = latte.subject(**settings)
    batch, frames, tokens = settings["batch"], settings["frames"], settings["caption"]
    kept = torch.ones(batch, tokens)
    for video in range(batch):
        kept[video, tokens - 1 - video :] = 0
    bias = -10_000.0 * (1 - kept.repeat_interleave(frames, 0))
    masks = {"rows": bias, "bias": bias[:, None], "videos": kept}
    if mask is not None:
        kwargs["encoder_attention_mask"] = masks[mask]
    if not temporal:
        kwargs["enable_temporal_attentions"] = False
    if times == "same":
        kwargs["timestep"] = torch.full((batch,), 321)
    if recompute:
        model.enable_gradient_checkpointing()
    return model.train(), kwargs


def case(method: str = "dsp", dtype: torch.dtype = torch.float64, counted: bool = True, **settings: Any) -> Case:
    return Case(built, settings, config={"method": method}, dtype=dtype, counted=counted)


# By name: the case, the number of ranks at which it is always run, and what stages that mix along the sharded dim do.
CASES: dict[str, tuple[Case, tuple[int, ...], str]] = {
    "fp32": (case(dtype=torch.float32), (2, 3, 4), "local"),
    "fp64": (case(), (3,), "local"),
    "ulysses": (case("ulysses", heads=12), (4,), "ulysses"),
    "recompute": (case(recompute=True, counted=False), (2,), "local"),
    # And fewer heads, which Ulysses cannot share out: some rank has no frame.
    "fewer frames than ranks": (case(frames=2, heads=2), (3,), "local"),
    "one frame": (case(frames=1, heads=12), (4,), "ulysses"),
    "space only": (case(temporal=False), (3,), "local"),
    "mask of rows": (case(mask="rows"), (2,), "local"),
    "mask as bias": (case(mask="bias", frames=5, batch=1), (4,), "local"),
    "guidance": (case(batch=4, frames=5, times="same", caption=3), (2,), "local"),
}


def _hold(size: int, names: list[str]) -> None:
    for name, result in zip(names, assert_parity(size, *(CASES[name][0] for name in names)), strict=True):
        expected = CASES[name][2]
        assert {inside for *_, inside in result.stages} == {"local", expected}, f"{name}: {result.stages}"
        dims = [dim for _, dim, _, _ in result.stages]
        if expected == "local" and name != "space only":
            assert dims == ["t", "s", "t", "s", "s", "s"], f"{name}: {result.stages}"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_sharded_latte_has_the_unsharded_output_gradients_and_the_planned_bytes(size):
    _hold(size, [name for name, (_, sizes, _) in CASES.items() if size in sizes])


@pytest.mark.matrix
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_same_of_every_case_at_every_number_of_ranks(size):
    _hold(size, [name for name, (_, sizes, _) in CASES.items() if size not in sizes])


def _mask_of_videos(size: int) -> tuple[str, str]:
    config = SequenceParallelConfig(method="dsp", size=size)
    model, kwargs = built()
    masked, refused = built(mask="videos")[1], ""
    with torch.no_grad():
        expected = model(**kwargs).sample
        handle = parallelize(model, config=config, groups=SequenceParallelGroups.build(config))
        with pytest.raises(SequenceParallelConfigError) as caught:
            model(**masked)
        refused = str(caught.value)
        # What was refused leaves nothing behind.
        torch.testing.assert_close(model(**kwargs).sample, expected)
    handle.remove()
    with pytest.raises(RuntimeError, match="invalid for input of size") as upstream:
        model(**masked)
    return refused, str(upstream.value)


def test_a_mask_that_diffusers_fails_on_is_refused_with_the_shape_that_it_takes():
    answers = spawn(_mask_of_videos, 2, 2)
    assert len({refused for refused, _ in answers}) == 1
    assert "encoder_attention_mask" in answers[0][0]
    assert "(b t) m" in answers[0][0]


def test_the_plan_of_another_model_is_refused():
    with pytest.raises(SequenceParallelConfigError, match="plan of a LatteTransformer3DModel, not of a Linear"):
        latte.plan(nn.Linear(2, 2))
