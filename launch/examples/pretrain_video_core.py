r"""Trains a video diffusion transformer on bouncing digits with Megatron-core alone.

    torchrun --nproc-per-node 8 -m dsp_plugin.launch launch/examples/pretrain_video_core.py --sp-method dsp \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --context-parallel-size 2

The model is `dsp_plugin.models.video_dit.VideoDiT` on Megatron's layers, with its own training loop, Megatron's data
parallelism, optimizer and pipeline schedules. On a machine without a GPU, add --cpu before the script.

The initial weights depend on a parameter's name only, and the batch on the step only, so losses and gradients of runs
with different tensor, pipeline, context and data parallel sizes are comparable; ``--metrics-out`` and ``--dump-grads``
write them down, gradients in the names and the order of rows of `VideoDiT`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from dsp_plugin.launch.examples import core_training
from dsp_plugin.launch.examples.core_training import Batch, Chunks
from dsp_plugin.launch.examples.moving_digits import VOCABULARY, MovingDigits, add_arguments
from dsp_plugin.patches.megatron.models import video_dit_weights
from dsp_plugin.patches.megatron.video_dit import ParallelVideoDiT, VideoShape

WORDS_PER_DIGIT = 3


def parse_args() -> argparse.Namespace:
    """The command line, in Megatron's own names where Megatron has one."""
    parser = core_training.parser(__doc__)
    parser.set_defaults(hidden_size=96, num_attention_heads=4)
    add_arguments(parser, frames=8)
    return parser.parse_args()


def main() -> None:
    """Makes the world of ranks, trains in it, and ends it."""
    args = parse_args()
    with core_training.world(args):
        config = TransformerConfig(**core_training.model_arguments(args))
        chunks = build_model(args, config)
        videos = MovingDigits(args.global_batch_size * args.train_iters, args.frames, args.canvas, seed=args.seed)
        shape = video_shape(args)
        core_training.train(
            args,
            config,
            chunks,
            step=partial(train_step, args, chunks, videos),
            gradients=video_dit_weights.whole_gradients,
            tokens=shape.frames * shape.patches,
        )


def video_shape(args: argparse.Namespace) -> VideoShape:
    """Of every video of the run."""
    return VideoShape(args.frames, args.canvas, args.canvas, caption=WORDS_PER_DIGIT, patch=args.patch)


def build_model(args: argparse.Namespace, config: TransformerConfig) -> Chunks:
    """This rank's chunks of the model, with its first weights."""

    def make(**place: Any) -> ParallelVideoDiT:
        model = ParallelVideoDiT(
            config, video_shape(args), vocabulary=len(VOCABULARY), positions=args.positions, **place
        )
        video_dit_weights.load(model, video_dit_weights.Drawn(model, args.seed))
        return model

    return core_training.build_chunks(args, config, make)


def loss_func(count: int, target: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    """Megatron's two outputs: this rank's part of the mean squared error over whole videos, and what to report.

    Megatron multiplies the first by the context-parallel size and averages gradients over these ranks, so they add up
    to the gradient of the mean, however unevenly tokens are spread.

    Args:
        count: elements of the whole micro-batch.
        target, velocity: of this rank's tokens.
    """
    loss = (velocity.float() - target).square().sum() / count
    # A copy: the schedule scales the loss in place.
    return loss, loss.detach().double().clone()


def forward_step(batches: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, partial]:
    """One microbatch through one chunk, at the videos' own times and noise (rectified flow)."""
    batch = next(batches)
    video, noise, t = batch["video"], batch["noise"], batch["t"]
    share = t.view(-1, 1, 1, 1, 1)
    output = model(share * video + (1 - share) * noise, t, batch["labels"])
    target = model.module.local_target(video - noise)
    return output, partial(loss_func, video.numel(), target)


def train_step(args: argparse.Namespace, chunks: Chunks, videos: MovingDigits, step: int) -> float:
    """Forward and backward of one global batch, gradients finalized.

    Returns:
        The mean loss over its elements, the same on every rank of the last pipeline stage; 0 elsewhere.
    """
    reports = core_training.run_schedule(
        args,
        chunks,
        forward_step=forward_step,
        batches=partial(core_training.microbatches, args, videos, step),
        seq_length=chunks[0].module.pipeline_seq_length(),
    )
    return core_training.mean_of_parts(args, reports)


if __name__ == "__main__":
    main()
