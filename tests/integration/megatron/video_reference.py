"""The plain `VideoDiT` in one process, trained on what examples/pretrain_video_core.py trains on, and no Megatron."""

from __future__ import annotations

import torch
from megatron_runs import Run
from plain_training import BATCH, SEED, STEPS, train, with_first_weights

from dsp_plugin.launch.examples.moving_digits import VOCABULARY, MovingDigits
from dsp_plugin.models.rectified_flow import RectifiedFlow
from dsp_plugin.models.video_dit import VideoDiT
from dsp_plugin.patches.megatron.models.video_dit_weights import draw


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
    with_first_weights(model, draw)
    videos = MovingDigits(BATCH * STEPS, frames, canvas, seed=SEED)

    def loss_of(step: int) -> torch.Tensor:
        items = [videos[step * BATCH + place] for place in range(BATCH)]
        batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
        return RectifiedFlow().loss(model, batch["video"], batch["labels"], batch["t"], batch["noise"])

    return train(model, loss_of, dumped)
