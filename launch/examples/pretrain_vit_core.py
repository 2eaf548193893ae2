r"""Trains a vision transformer on simulated weather with Megatron-core alone.

    torchrun --nproc-per-node 8 -m dsp_plugin.launch launch/examples/pretrain_vit_core.py --sp-method dsp \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --context-parallel-size 2

The model is `dsp_plugin.models.vit.VisionTransformer` on Megatron's layers. Axial attention is shared by --sp-method
dsp, ``--attention full`` by ulysses, usp or ring. Every micro-batch brings other variables. On a machine without a GPU,
add --cpu before the script.

The initial weights depend on a parameter's name only, and the batch on the step only, so losses and gradients of runs
with different tensor, pipeline, context and data parallel sizes are comparable; ``--metrics-out`` and ``--dump-grads``
write them down, gradients in the names and the order of rows of `VisionTransformer`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from dsp_plugin.launch.examples import core_training
from dsp_plugin.launch.examples.core_training import Batch, Chunks
from dsp_plugin.launch.examples.shallow_water import (
    VARIABLES,
    ShallowWater,
    Weather,
    add_arguments,
    batch_of_some_variables,
)
from dsp_plugin.models.vit_objective import latitude_weights
from dsp_plugin.patches.megatron.models import video_dit_weights, vit_weights
from dsp_plugin.patches.megatron.vit import ParallelVisionTransformer, VitShape


def parse_args() -> argparse.Namespace:
    """The command line, in Megatron's own names where Megatron has one."""
    parser = core_training.parser(__doc__)
    parser.set_defaults(hidden_size=64, num_attention_heads=4)
    add_arguments(parser, patch=2, weathers=2)
    parser.add_argument("--classify", action="store_true", help="also tell the weathers apart, under full attention")
    parser.add_argument("--lead-time", action="store_true", help="tell the model how far ahead to predict")
    parser.add_argument("--moments", type=int, default=13, help="of each simulation")
    parser.add_argument("--times", type=int, default=1, help="moments of a sample: more than 1 are a dim of the grid")
    return parser.parse_args()


def main() -> None:
    """Makes the world of ranks, trains in it, and ends it."""
    args = parse_args()
    with core_training.world(args):
        config = TransformerConfig(**core_training.model_arguments(args))
        shape = vit_shape(args)
        chunks = build_model(args, config, shape)
        water = ShallowWater(args.rows, args.columns)
        weather = Weather(water, args.weathers, args.moments, args.hours, seed=args.seed)
        weight_Y = latitude_weights(torch.from_numpy(water.latitudes))
        core_training.train(
            args,
            config,
            chunks,
            step=partial(train_step, args, chunks, weather, weight_Y),
            gradients=video_dit_weights.whole_gradients,
            tokens=prod(shape.tokens.values()),
        )


def vit_shape(args: argparse.Namespace) -> VitShape:
    """The model of the run, and its grid."""
    moments = args.times > 1
    return VitShape(
        len(VARIABLES),
        (args.times,) * moments + (args.rows, args.columns),
        (1,) * moments + (args.patch, args.patch),
        attention=args.attention,
        registers=args.registers,
        classes=args.weathers if args.classify else 0,
        lead_time=args.lead_time,
    )


def build_model(args: argparse.Namespace, config: TransformerConfig, shape: VitShape) -> Chunks:
    """This rank's chunks of the model, with its first weights."""

    def make(**place: Any) -> ParallelVisionTransformer:
        model = ParallelVisionTransformer(config, shape, **place)
        video_dit_weights.load(model, video_dit_weights.Drawn(model, args.seed, vit_weights.draw))
        return model

    return core_training.build_chunks(args, config, make)


def sample_of(args: argparse.Namespace, weather: Weather, index: int) -> Batch:
    """One sample: moments of one weather that follow one another, as a dim of the grid where there are several."""
    windows = (args.moments - 1) // args.times
    state, window = divmod(index % (args.weathers * windows), windows)
    first = state * (args.moments - 1) + window * args.times
    moments = [weather[moment] for moment in range(first, first + args.times)]
    fields, target = (torch.stack([moment[name] for moment in moments], dim=1) for name in ("fields", "target"))
    if args.times == 1:
        fields, target = fields[:, 0], target[:, 0]
    return {"fields": fields, "target": target, "index": moments[0]["index"]}


def batch_of(args: argparse.Namespace, weather: Weather, indices: Sequence[int]) -> Batch:
    """A micro-batch, by the indices of its samples among all of the run."""
    samples = [sample_of(args, weather, index) for index in indices]
    batch = batch_of_some_variables(samples)
    if args.lead_time:
        batch["lead_time"] = torch.full((len(samples),), args.hours / 24)
    if args.classify:
        batch["label"] = torch.stack([sample["index"] for sample in samples]) // (args.moments - 1)
    return batch


def microbatches(args: argparse.Namespace, weather: Weather, step: int) -> Iterator[Batch]:
    """This data-parallel rank's part of the global batch of a step, whole: the model cuts out what a rank needs."""
    for indices in core_training.own_samples(args, step).split(args.micro_batch_size):
        batch = batch_of(args, weather, indices.tolist())
        yield {name: tensor.cuda() for name, tensor in batch.items()}


def forward_step(weight_Y: Tensor, batches: Iterator[Batch], model: DistributedDataParallel) -> tuple[Tensor, Any]:
    """One microbatch through one chunk."""
    batch = next(batches)
    out_NBF = model(batch["fields"], batch["variables"], batch["wanted"], batch.get("lead_time"))

    def loss_func(out_NBF: Tensor) -> tuple[Tensor, Tensor]:
        """Megatron's two outputs: this rank's part of the mean loss, and what to report.

        Megatron multiplies the first by the context-parallel size and averages gradients over these ranks, so they add
        up to the gradient of the mean, however unevenly tokens are spread.
        """
        loss = model.module.local_loss(out_NBF, batch["target"], weight_Y, batch.get("label"))
        # A copy: the schedule scales the loss in place.
        return loss, loss.detach().double().clone()

    return out_NBF, loss_func


def train_step(args: argparse.Namespace, chunks: Chunks, weather: Weather, weight_Y: Tensor, step: int) -> float:
    """Forward and backward of one global batch, gradients finalized.

    Returns:
        The mean loss of its micro-batches, the same on every rank of the last pipeline stage; 0 elsewhere.
    """
    reports = core_training.run_schedule(
        args,
        chunks,
        forward_step=partial(forward_step, weight_Y),
        batches=partial(microbatches, args, weather, step),
        seq_length=chunks[0].module.pipeline_seq_length(),
    )
    return core_training.mean_of_parts(args, reports)


if __name__ == "__main__":
    main()
