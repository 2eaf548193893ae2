"""The plain `VideoDiT` in one process, trained on what launch/pretrain_video_core.py trains on, and no Megatron."""

from __future__ import annotations

import torch
from megatron_runs import Run

from dsp_plugin.launch.moving_digits import VOCABULARY, MovingDigits
from dsp_plugin.models.rectified_flow import RectifiedFlow
from dsp_plugin.models.video_dit import VideoDiT
from dsp_plugin.patches.megatron.video_dit_weights import draw

SEED, BATCH, STEPS = 1234, 4, 3


def plain_run(
    *,
    dumped: int = 0,
    depth: int = 4,
    frames: int = 8,
    canvas: int = 20,
    width: int = 96,
    heads: int = 4,
    positions: str = "rotary",
) -> Run:
    """Three steps of Adam on the whole batch, gradients clipped to norm 1; those of step `dumped` are kept."""
    model = VideoDiT(width=width, heads=heads, depth=depth, vocabulary=len(VOCABULARY), positions=positions)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(draw(name, parameter.shape, SEED))
    videos = MovingDigits(BATCH * STEPS, frames, canvas, seed=SEED)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        items = [videos[step * BATCH + place] for place in range(BATCH)]
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        loss = RectifiedFlow().loss(model, batch["video"], batch["labels"], batch["t"], batch["noise"])
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        if step == dumped:
            gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return Run(losses, gradients, "")
