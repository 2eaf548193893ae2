"""Rectified flow (arXiv 2209.03003): its loss, and its sampler.

Shape suffixes are those of video_dit.py: B batch, T frames, I image channels, Y and X pixels.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Velocity(Protocol):
    """A model of the velocity field, such as `VideoDiT`."""

    def __call__(self, video_BTIYX: Tensor, t_B: Tensor, labels: Tensor, /) -> Tensor:
        """The velocity, in the video's shape."""


class RectifiedFlow:
    """Straight paths from noise (t = 0) to data (t = 1), whose velocity is data minus noise everywhere on the path."""

    def loss(
        self,
        model: Velocity,
        video: Tensor,
        labels: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity, over all elements.

        Args:
            model: the velocity field.
            video: data [B, T, I, Y, X].
            labels: the condition, as the model takes it.
            t: times [B] in [0, 1], drawn uniformly if None.
            noise: standard normal, in the video's shape; drawn if None.
            generator: what both are drawn from; on the video's device.

        Returns:
            A scalar, in fp32 at least: a bf16 mean over a video would lose the digits that training curves show.
        """
        if t is None:
            t = torch.rand(video.shape[0], generator=generator, device=video.device)
        if noise is None:
            noise = torch.randn(video.shape, generator=generator, device=video.device, dtype=video.dtype)
        t_B1111 = rearrange(t, "b -> b 1 1 1 1").to(video.dtype)
        velocity = model(t_B1111 * video + (1 - t_B1111) * noise, t, labels)
        target = video - noise
        return F.mse_loss(velocity.to(torch.promote_types(velocity.dtype, torch.float32)), target)

    @torch.no_grad()
    def sample(
        self,
        model: Velocity,
        shape: tuple[int, ...],
        labels: Tensor,
        steps: int,
        generator: torch.Generator | None = None,
        guidance: float = 1.0,
        null_labels: Tensor | None = None,
    ) -> Tensor:
        """Video [B, T, I, Y, X], fp32 on the labels' device, by `steps` Euler steps from noise.

        `guidance` other than 1 moves the velocity away from that of `null_labels` by that factor (classifier-free
        guidance, arXiv 2207.12598). Noise is drawn where the generator lives, so one seed is one video on any device.
        """
        device = labels.device
        video = torch.randn(shape, generator=generator, device=generator.device if generator else device).to(device)
        for step in range(steps):
            t_B = torch.full((shape[0],), step / steps, device=device)
            velocity = model(video, t_B, labels).float()
            if guidance != 1.0:
                assert null_labels is not None, "guidance compares with the velocity of null_labels"
                without = model(video, t_B, null_labels).float()
                velocity = without + guidance * (velocity - without)
            video = video + velocity / steps
        return video


class RectifiedFlowObjective(nn.Module):
    """The model and its loss as one module, for engines that wrap a module whose forward returns the loss."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.flow = RectifiedFlow()

    def forward(self, video: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The loss of `RectifiedFlow.loss`; times and noise come with the data, so that every process sees the same."""
        return self.flow.loss(self.model, video, labels, t, noise)
