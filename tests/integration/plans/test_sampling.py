"""Generation under sharding: denoising loops of the models' users give the pictures that one process gives."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsp_plugin import Layout, SequenceParallelConfig, SequenceParallelGroups, ledger, parallelize
from dsp_plugin.comm import all_gather
from dsp_plugin.models.rectified_flow import RectifiedFlow
from dsp_plugin.models.video_dit import VideoDiT
from dsp_plugin.patches.diffusers import latte, wan
from dsp_plugin.spawn import spawn

STEPS, GUIDANCE, CAPTION = 3, 4.0, 5
# Videos asked for one after the other, with as many denoising loops.
BATCHES = (2, 1, 3)


def guided(model: nn.Module, latents: Tensor, time: Tensor, text: Tensor) -> Tensor:
    """Classifier-free guidance as pipelines do it: one batch, twice as large, without and with the text."""
    both = torch.cat([torch.zeros_like(text), text])
    times = time.expand(2 * latents.shape[0])
    without, with_text = model(torch.cat([latents, latents]), timestep=times, encoder_hidden_states=both).sample.chunk(
        2
    )
    return without + GUIDANCE * (with_text - without)


def latte_video(model: nn.Module, batch: int) -> Tensor:
    """Latte by DDIM."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    latents, text = torch.randn(batch, 3, 7, 6, 6), torch.randn(batch, CAPTION, 8)
    for time in scheduler.timesteps:
        latents = scheduler.step(guided(model, latents, time, text), time, latents).prev_sample
    return latents


def wan_video(model: nn.Module, batch: int) -> Tensor:
    """Wan by the Euler steps of flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    latents, text = torch.randn(batch, 3, 5, 6, 6), torch.randn(batch, CAPTION, 8)
    for time in scheduler.timesteps:
        latents = scheduler.step(guided(model, latents, time, text), time, latents).prev_sample
    return latents


def own_video(model: nn.Module, batch: int) -> Tensor:
    """Our video model by its own sampler, which asks for both velocities one after the other."""
    assert isinstance(model, VideoDiT)
    labels = torch.randint(10, (batch,))
    null = model.condition_embed.null(labels)
    return RectifiedFlow().sample(model, (batch, 7, 1, 12, 12), labels, STEPS, guidance=GUIDANCE, null_labels=null)


SMALL: dict[str, Any] = {"channels": 3, "caption_channels": 8, "heads": 4, "batch": 2, "caption": 3}
MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "latte": lambda: latte.subject(frames=7, side=6, head_dim=4, **SMALL),
    "wan": lambda: wan.subject(frames=5, height=6, width=6, head_dim=12, **SMALL),
    "own": lambda: (VideoDiT(width=16), {}),
}
VIDEOS = {"latte": latte_video, "wan": wan_video, "own": own_video}


@torch.no_grad()
def _videos(model: nn.Module, kind: str) -> list[Tensor]:
    torch.manual_seed(8)
    return [VIDEOS[kind](model.eval(), batch) for batch in BATCHES]


def _built(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(4)
    return MODELS[kind]()


def _check(found: Tensor, expected: Tensor, groups: SequenceParallelGroups, mean: bool = False) -> None:
    """On every rank, or in the mean over ranks, relative to the largest entry."""
    by_rank = all_gather(found.flatten()[None], 0, Layout.of_sizes([1] * groups.sp.size), axis=groups.sp, method="test")
    by_rank = by_rank.mean(0, keepdim=True) if mean else by_rank
    assert (by_rank - expected.flatten()).abs().max() < 1e-5 * expected.abs().max()


def _sampled(kind: str, config: dict[str, Any], size: int) -> None:
    section = SequenceParallelConfig(**config, size=size)
    groups = SequenceParallelGroups.build(section)
    reference, sharded = _built(kind)[0], _built(kind)[0]
    parallelize(sharded, config=section, groups=groups)
    with ledger() as log:
        found = _videos(sharded, kind)
    assert log.bytes() > 0
    for video, expected in zip(found, _videos(reference, kind), strict=True):
        _check(video, expected, groups)


def _sampled_all(size: int) -> None:
    _sampled("latte", {"method": "dsp"}, size)
    _sampled("own", {"method": "dsp"}, size)
    _sampled("wan", {"method": "ring" if size == 3 else "ulysses"}, size)
    if size == 4:
        _sampled("wan", {"method": "usp", "ulysses_size": 2, "ring_size": 2}, size)


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.matrix), 3, 4])
def test_guided_videos_of_changing_batches_are_those_of_one_process(size):
    spawn(_sampled_all, size, size)


def _trained(model: nn.Module, kwargs: dict[str, Any], interrupted: bool) -> list[Tensor]:
    model.train().enable_gradient_checkpointing()
    loss = model(**kwargs).sample.square().mean()
    if interrupted:
        _videos(model, "latte")
        model.train()
    loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def _interrupted(size: int) -> None:
    config = SequenceParallelConfig(method="dsp", size=size)
    groups = SequenceParallelGroups.build(config)
    expected = _trained(*_built("latte"), interrupted=False)
    sharded, kwargs = _built("latte")
    parallelize(sharded, config=config, groups=groups)
    largest = max(gradient.abs().max() for gradient in expected)
    for gradient, wanted in zip(_trained(sharded, kwargs, interrupted=True), expected, strict=True):
        # That of the bias of keys is zero but for rounding.
        if wanted.abs().max() > 1e-3 * largest:
            _check(gradient, wanted, groups, mean=True)


def test_videos_sampled_before_a_checkpointed_backward_pass_leave_its_gradients_alone():
    spawn(_interrupted, 3, 3)


def _averaged(size: int) -> None:
    config = SequenceParallelConfig(method="dsp", size=size)
    groups = SequenceParallelGroups.build(config)
    reference, sharded = _built("latte")[0], _built("latte")[0]
    parallelize(sharded, config=config, groups=groups)
    copied, expected = deepcopy(sharded), _videos(reference, "latte")
    with torch.no_grad():
        for model in (copied, reference):
            for parameter in model.parameters():
                parameter.mul_(0.9)
    for model, wanted in ((copied, _videos(reference, "latte")), (sharded, expected)):
        for video, alone in zip(_videos(model, "latte"), wanted, strict=True):
            _check(video, alone, groups)


def test_a_copy_with_averaged_weights_is_sharded_as_the_model_is():
    spawn(_averaged, 2, 2)
